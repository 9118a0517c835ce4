"""How sure a measured rate is, and whether two arms on the same prompts differ.

- A rate's interval is Wilson's score interval (E. B. Wilson, "Probable Inference, the Law of Succession, and
  Statistical Inference", JASA 22, 1927), which L. D. Brown, T. T. Cai and A. DasGupta, "Interval Estimation
  for a Binomial Proportion", Statistical Science 16, 2001, recommend. A bootstrap would call a rate of 0 out
  of 50 certain.
- The interval of a rate's change between two arms on the same prompts is Newcombe's score interval (method 10
  of R. G. Newcombe, "Improved Confidence Intervals for the Difference Between Binomial Proportions Based on
  Paired Data", Statistics in Medicine 17, 1998). A bootstrap would call a change of 50 out of 50 certain.
- A mean's interval, and that of its change, is the percentile bootstrap (B. Efron and R. J. Tibshirani, "An
  Introduction to the Bootstrap", 1993, chapter 13).
- Two arms that answered the same prompts are compared by McNemar's test in its exact form: of the prompts on
  which the arms differ, as many should have changed one way as the other (Q. McNemar, "Note on the Sampling
  Error of the Difference Between Correlated Proportions or Percentages", Psychometrika 12, 1947).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from mlflow_safelock.errors import EvaluationError

CONFIDENCE = 0.95
"""Confidence of intervals where none is given."""

RESAMPLES = 10_000
"""Number of bootstrap samples where none is given."""


DRAWN_AT_ONCE = 1 << 18
"""Most numbers that a bootstrap draws at once."""


@dataclass(frozen=True)
class Interval:
    """An estimate and where the true value lies, at a confidence.

    Attributes:
        estimate: What was measured.
        low: Lower end, at most the estimate.
        high: Upper end, at least the estimate.
        confidence: The interval's confidence, between 0 and 1.
    """

    estimate: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class PairedTest:
    """Two arms on the same prompts, compared by the exact McNemar test.

    Attributes:
        only_first: Number of prompts on which the first arm has the outcome and the second does not.
        only_second: Number of prompts on which it is the other way round.
        prompts: Number of all prompts.
        p_value: Two-sided; the chance of a split at least this uneven if neither arm were likelier to have
            the outcome. 1 where the arms never differ.
    """

    only_first: int
    only_second: int
    prompts: int
    p_value: float


def rate_interval(count: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a rate.

    Args:
        count: How often the outcome came.
        total: Out of how many.
        confidence: The interval's confidence.

    Raises:
        EvaluationError: There is nothing to take a rate of, the count is not between 0 and the total, or the
            confidence is not between 0 and 1.

    Example:
        >>> interval = rate_interval(0, 50)
        >>> interval.estimate, round(interval.high, 3)
        (0.0, 0.071)
    """
    _check_confidence(confidence)
    if total < 1 or not 0 <= count <= total:
        raise EvaluationError(f"{count} of {total} is no rate.", next_step="Measure at least one prompt.")
    found = binomtest(count, total).proportion_ci(confidence, method="wilson")
    return _interval(count / total, float(found.low), float(found.high), confidence)


def mean_interval(
    values: Sequence[float], *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of a mean, such as that of a judge's scores.

    For a rate, ``rate_interval`` is the better one: where all values are the same, this one has no width.

    Args:
        values: What was measured, one value per prompt.
        confidence: The interval's confidence.
        resamples: Number of bootstrap samples.
        seed: The same values with the same seed give the same interval.

    Raises:
        EvaluationError: There are no values, one is not finite, or the confidence or the number of samples
            cannot be used.
    """
    _check_confidence(confidence)
    if resamples < 1:
        raise EvaluationError(
            f"A bootstrap of {resamples} samples says nothing.", next_step="Take 1000 or more."
        )
    measured = np.asarray(values, dtype=np.float64)
    if measured.ndim != 1 or not measured.size or not np.isfinite(measured).all():
        raise EvaluationError("A mean needs at least one value, and finite ones only.")
    means = _bootstrap_means(measured, resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return _interval(float(measured.mean()), float(low), float(high), confidence)


def difference_interval(
    first: Sequence[float],
    second: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Paired percentile bootstrap interval of the mean of ``second`` less that of ``first``.

    Prompts are drawn, each with what both arms made of it, so that what makes a prompt hard for both cancels.
    For rates, ``rate_difference_interval`` is the better one: where every prompt changed alike, this one has
    no width.

    Args:
        first: One arm's values, one per prompt; true and false count as 1 and 0.
        second: The other arm's, for the same prompts in the same order.
        confidence: The interval's confidence.
        resamples: Number of bootstrap samples.
        seed: The same values with the same seed give the same interval.

    Raises:
        EvaluationError: The arms have no values or not equally many, or as for ``mean_interval``.
    """
    _check_paired(len(first), len(second))
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    return mean_interval(differences.tolist(), confidence=confidence, resamples=resamples, seed=seed)


def rate_difference_interval(
    first: Sequence[bool], second: Sequence[bool], confidence: float = CONFIDENCE
) -> Interval:
    """Newcombe's paired score interval of the rate of ``second`` less that of ``first``.

    Args:
        first: For each prompt, whether the first arm had the outcome (complied, say).
        second: The same of the second arm, in the same order.
        confidence: The interval's confidence.

    Raises:
        EvaluationError: The arms have no outcomes or not equally many, or the confidence is not between 0 and
            1.

    Example:
        >>> interval = rate_difference_interval([True] * 50, [False] * 50)
        >>> interval.estimate, round(interval.high, 3)
        (-1.0, -0.899)
    """
    _check_paired(len(first), len(second))
    pairs = [(bool(one), bool(other)) for one, other in zip(first, second, strict=True)]
    before = rate_interval(sum(one for one, _ in pairs), len(pairs), confidence)
    after = rate_interval(sum(other for _, other in pairs), len(pairs), confidence)
    likeness = _likeness(pairs)

    def width(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * likeness * one * other + other * other))

    change = after.estimate - before.estimate
    down = width(after.estimate - after.low, before.high - before.estimate)
    up = width(after.high - after.estimate, before.estimate - before.low)
    return _interval(change, max(-1.0, change - down), min(1.0, change + up), confidence)


def _likeness(pairs: Sequence[tuple[bool, bool]]) -> float:
    """The correlation (phi) of two arms' outcomes, with Newcombe's correction for continuity."""
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    alike = float(both * neither - only_first * only_second)
    if alike > 0:
        alike = max(0.0, alike - len(pairs) / 2)
    return alike / math.sqrt(margins) if margins else 0.0


def paired_test(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """The exact McNemar test of two arms on the same prompts.

    Args:
        first: For each prompt, whether the first arm had the outcome (complied, say).
        second: The same of the second arm, in the same order.

    Raises:
        EvaluationError: The arms have no outcomes or not equally many.

    Example:
        >>> paired_test([True] * 6, [False] * 6).p_value
        0.03125
    """
    _check_paired(len(first), len(second))
    only_first = sum(bool(one) and not other for one, other in zip(first, second, strict=True))
    only_second = sum(bool(other) and not one for one, other in zip(first, second, strict=True))
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0
    return PairedTest(only_first, only_second, len(first), p_value)


def _bootstrap_means(values: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    # Some samples at a time: one by one is slow, and all of them would take resamples x values numbers.
    at_once = max(1, DRAWN_AT_ONCE // values.size)
    starts = range(0, resamples, at_once)
    return np.concatenate(
        [
            values[random.integers(values.size, size=(min(at_once, resamples - start), values.size))].mean(
                axis=1
            )
            for start in starts
        ]
    )


def _interval(estimate: float, low: float, high: float, confidence: float) -> Interval:
    # Rounding, or a few skewed values, may put an end beyond the estimate.
    return Interval(estimate, min(low, estimate), max(high, estimate), confidence)


def check_seed(seed: object) -> None:
    """Raise EvaluationError where a seed is no whole number from zero."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise EvaluationError(f"A seed is a whole number from 0, and {seed!r} is none.", next_step="Take 0.")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise EvaluationError(f"A confidence of {confidence} is not between 0 and 1.", next_step="Take 0.95.")


def _check_paired(first: int, second: int) -> None:
    if first != second or not first:
        raise EvaluationError(
            f"Arms of {first} and {second} values cannot be compared prompt by prompt.",
            next_step="Give both arms the same prompts, at least one.",
        )
