"""Intervals hold the estimate, cover the truth as often as they say, and the paired test is McNemar's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate import (
    difference_interval,
    mean_interval,
    paired_test,
    rate_difference_interval,
    rate_interval,
)

counts = st.integers(1, 2000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))
confidences = st.floats(0.5, 0.999)
scores = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)
outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200)


@given(counts, confidences)
def test_a_rates_interval_holds_the_estimate_and_stays_within_0_and_1(
    of: tuple[int, int], confidence: float
) -> None:
    interval = rate_interval(*of, confidence)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.low < interval.high
    assert interval.estimate == of[0] / of[1]


@given(counts, st.integers(2, 20))
def test_a_rates_interval_narrows_with_more_prompts(of: tuple[int, int], times: int) -> None:
    few, many = rate_interval(*of), rate_interval(of[0] * times, of[1] * times)
    assert many.high - many.low < few.high - few.low


@given(counts)
def test_a_rates_interval_is_symmetric_and_widens_with_confidence(of: tuple[int, int]) -> None:
    count, total = of
    interval, mirrored = rate_interval(count, total), rate_interval(total - count, total)
    assert interval.low == pytest.approx(1 - mirrored.high, abs=1e-12)
    assert rate_interval(count, total, 0.99).high >= interval.high


def test_a_rates_interval_is_wilsons() -> None:
    count, total, z = 7, 40, 1.959963984540054
    rate = count / total
    middle = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    interval = rate_interval(count, total)
    assert (interval.low, interval.high) == pytest.approx((middle - half, middle + half), abs=1e-12)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 0.5, 0.8])
def test_a_rates_interval_covers_the_true_rate_as_often_as_it_says(rate: float) -> None:
    drawn = np.random.default_rng(7).binomial(100, rate, size=4000)
    intervals = {int(count): rate_interval(int(count), 100) for count in np.unique(drawn)}
    covered = np.mean([intervals[int(n)].low <= rate <= intervals[int(n)].high for n in drawn])
    assert 0.92 <= covered <= 0.985


@settings(deadline=None, max_examples=60)
@given(scores, st.integers(0, 2**32))
def test_a_means_interval_holds_the_estimate_and_is_the_same_for_the_same_seed(
    values: list[float], seed: int
) -> None:
    interval = mean_interval(values, resamples=200, seed=seed)
    assert interval.low <= interval.estimate <= interval.high
    assert interval == mean_interval(values, resamples=200, seed=seed)
    slack = 1e-9 * max(map(abs, values))
    assert min(values) - slack <= interval.low
    assert interval.high <= max(values) + slack


def test_a_means_interval_narrows_with_more_prompts_and_depends_on_the_seed() -> None:
    values = np.random.default_rng(3).integers(1, 6, size=800).astype(float).tolist()
    few, many = mean_interval(values[:50]), mean_interval(values)
    assert many.high - many.low < (few.high - few.low) / 3
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_a_means_interval_agrees_with_scipys_bootstrap() -> None:
    values = np.random.default_rng(5).exponential(size=60)
    theirs = bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    ours = mean_interval(values.tolist())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_a_means_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(11)
    intervals = [
        mean_interval(random.normal(2, 1, size=50).tolist(), resamples=300, seed=seed) for seed in range(300)
    ]
    covered = sum(interval.low <= 2 <= interval.high for interval in intervals) / 300
    assert 0.89 <= covered <= 0.985


@settings(deadline=None, max_examples=60)
@given(outcomes)
def test_a_difference_is_that_of_the_means_and_turns_round_with_the_arms(
    pairs: list[tuple[bool, bool]],
) -> None:
    first, second = [one for one, _ in pairs], [other for _, other in pairs]
    interval = difference_interval(first, second, resamples=200)
    assert interval.estimate == pytest.approx(np.mean(second) - np.mean(first), abs=1e-12)
    assert -1 <= interval.low <= interval.estimate <= interval.high <= 1
    turned = difference_interval(second, first, resamples=200)
    assert (turned.low, turned.high) == pytest.approx((-interval.high, -interval.low), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(outcomes)
def test_a_rates_change_is_never_certain_and_turns_round_with_the_arms(
    pairs: list[tuple[bool, bool]],
) -> None:
    first, second = [one for one, _ in pairs], [other for _, other in pairs]
    interval = rate_difference_interval(first, second)
    assert interval.estimate == pytest.approx(np.mean(second) - np.mean(first), abs=1e-12)
    assert -1 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.low < interval.high
    turned = rate_difference_interval(second, first)
    assert (turned.low, turned.high) == pytest.approx((-interval.high, -interval.low), abs=1e-12)


def test_a_rates_change_has_newcombes_interval() -> None:
    # One of the examples in Newcombe's article: 36 in both arms, 12 and 2 in one, of 50.
    first = [True] * 38 + [False] * 12
    second = [True] * 36 + [False] * 2 + [True] * 12
    interval = rate_difference_interval(first, second)
    assert (interval.low, interval.high) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    whole = rate_difference_interval([True] * 50, [False] * 50)
    assert (whole.low, whole.high) == (-1.0, pytest.approx(-0.8991, abs=5e-5))


@pytest.mark.parametrize("rates", [(0.5, 0.5, 0.9), (0.95, 0.02, 0.5), (0.3, 0.8, 0.6)])
def test_a_rates_change_is_covered_as_often_as_it_says(rates: tuple[float, float, float]) -> None:
    random = np.random.default_rng(3)
    before, kept, changed = rates  # of those that had the outcome, and of those that had not
    truth = before * kept + (1 - before) * (1 - changed) - before
    covered = 0
    for _ in range(400):
        first = random.random(60) < before
        second = np.where(first, random.random(60) < kept, random.random(60) < 1 - changed)
        interval = rate_difference_interval(first.tolist(), second.tolist())
        covered += interval.low <= truth <= interval.high
    assert covered / 400 >= 0.92


def test_a_paired_difference_is_surer_than_two_means_apart() -> None:
    first = np.random.default_rng(2).normal(0, 10, size=100)
    interval = difference_interval(first.tolist(), (first + 1).tolist())
    assert (interval.low, interval.high) == pytest.approx((1, 1))


@given(outcomes)
def test_the_paired_test_is_the_exact_one_by_hand(pairs: list[tuple[bool, bool]]) -> None:
    result = paired_test([one for one, _ in pairs], [other for _, other in pairs])
    b, c = pairs.count((True, False)), pairs.count((False, True))
    assert (result.only_first, result.only_second, result.prompts) == (b, c, len(pairs))
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert result.p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


@given(outcomes)
def test_the_paired_test_is_symmetric(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [one for one, _ in pairs], [other for _, other in pairs]
    result, turned = paired_test(first, second), paired_test(second, first)
    assert turned.p_value == pytest.approx(result.p_value, rel=1e-9)
    assert (turned.only_first, turned.only_second) == (result.only_second, result.only_first)


def test_the_numbers_are_those_of_statsmodels() -> None:
    # Computed with statsmodels 0.15.0, mcnemar([[8, 12], [4, 6]], exact=True)
    # and proportion_confint(7, 40, method="wilson").
    result = paired_test([True] * 20 + [False] * 10, [True] * 8 + [False] * 18 + [True] * 4)
    assert (result.only_first, result.only_second) == (12, 4)
    assert result.p_value == pytest.approx(0.076812744140625, rel=1e-12)
    interval = rate_interval(7, 40)
    assert (interval.low, interval.high) == pytest.approx((0.0874541374603592, 0.3194999033178772), rel=1e-12)


def test_arms_that_never_differ_are_no_evidence() -> None:
    assert paired_test([True, False], [True, False]).p_value == 1.0


def test_the_paired_test_rejects_as_rarely_as_it_says_where_nothing_differs() -> None:
    random = np.random.default_rng(13)
    rejected = sum(
        paired_test((random.random(100) < 0.5).tolist(), (random.random(100) < 0.5).tolist()).p_value < 0.05
        for _ in range(1000)
    )
    assert rejected / 1000 <= 0.065


@pytest.mark.parametrize(
    "call",
    [
        lambda: rate_interval(0, 0),
        lambda: rate_interval(-1, 3),
        lambda: rate_interval(4, 3),
        lambda: rate_interval(1, 3, 1.0),
        lambda: rate_interval(1, 3, math.nan),
        lambda: mean_interval([]),
        lambda: mean_interval([1.0, math.nan]),
        lambda: mean_interval([1.0], resamples=0),
        lambda: mean_interval([1.0], confidence=95),
        lambda: difference_interval([], []),
        lambda: difference_interval([1.0], [1.0, 2.0]),
        lambda: paired_test([], []),
        lambda: paired_test([True], [True, False]),
    ],
)
def test_what_says_nothing_is_refused(call) -> None:
    with pytest.raises(EvaluationError):
        call()
