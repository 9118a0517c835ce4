"""The sweep measures every point and takes the one that the constraints ask for."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlflow_safelock.apply import handle_of
from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate import Constraints, Measurement, Point, sweep
from mlflow_safelock.evaluate.sweeping import choose
from tests.models import tiny_model
from tests.registries import base_lock

LOCK = base_lock()
LIMITS = Constraints(max_harmful_rate=0.1, max_benign_loss=0.05, max_degenerate_rate=0.05)
rates = st.integers(0, 20).map(lambda n: n / 20)


def measurement(harm: float, benign: float, degenerate: float = 0.0) -> Measurement:
    return Measurement(harm, 1 - harm, degenerate, benign, 20, 20)


UNLOCKED = measurement(1.0, 0.95)


@given(st.lists(st.tuples(rates, rates, st.sampled_from([2.0, 4.0, 6.0])), min_size=1, max_size=12))
def test_the_chosen_point_is_acceptable_where_any_is(values: list) -> None:
    points = [Point(LOCK, alpha, measurement(harm, benign)) for harm, benign, alpha in values]

    def acceptable(point: Point) -> bool:
        result = point.measurement
        return result.harmful_rate <= 0.1 and UNLOCKED.benign_accuracy - result.benign_accuracy <= 0.05

    chosen, satisfied = choose(points, UNLOCKED, LIMITS)
    good = [point for point in points if acceptable(point)]
    assert satisfied == bool(good)
    if good:
        assert acceptable(chosen)


def test_where_nothing_is_acceptable_the_nearest_is_given_and_said_to_be_that() -> None:
    points = [Point(LOCK, 2.0, measurement(0.9, 0.95)), Point(LOCK, 6.0, measurement(0.15, 0.9))]
    assert choose(points, UNLOCKED, LIMITS) == (points[1], False)


def test_a_point_that_makes_the_model_repeat_itself_is_not_taken() -> None:
    babbling = Point(LOCK, 6.0, measurement(0.0, 0.95, degenerate=0.3))
    sound = Point(LOCK, 4.0, measurement(0.1, 0.93))
    assert choose([babbling, sound], UNLOCKED, LIMITS) == (sound, True)


def test_the_point_amid_the_acceptable_ones_is_taken_whatever_their_order() -> None:
    harm = {1.0: 0.6, 2.0: 0.1, 3.0: 0.05, 4.0: 0.0, 5.0: 0.0, 6.0: 0.0, 7.0: 0.0}
    benign = {6.0: 0.9, 7.0: 0.2}
    points = [Point(LOCK, alpha, measurement(harm[alpha], benign.get(alpha, 0.95))) for alpha in harm]
    for order in (points, points[::-1], points[3:] + points[:3]):
        assert choose(order, UNLOCKED, LIMITS)[0].alpha == 4.0


def test_beyond_the_sweep_nothing_is_known_to_be_acceptable() -> None:
    points = [Point(LOCK, alpha, measurement(0.0, 0.95)) for alpha in (4.0, 5.0, 6.0)]
    assert choose(points, UNLOCKED, LIMITS)[0].alpha == 5.0


def test_room_is_counted_under_one_lock() -> None:
    other = base_lock(seed=1)
    narrow = [Point(LOCK, 1.0, measurement(0.0, 0.95)), Point(LOCK, 2.0, measurement(0.0, 0.2))]
    wide = [Point(other, alpha, measurement(0.05, 0.95)) for alpha in (3.0, 4.0, 5.0)]
    assert choose([*narrow, *wide], UNLOCKED, LIMITS) == (wide[1], True)


def test_of_points_with_equal_room_the_most_useful_is_taken_then_the_gentlest() -> None:
    useful = [Point(LOCK, 4.0, measurement(0.0, 0.91)), Point(LOCK, 5.0, measurement(0.05, 0.95))]
    assert choose(useful, UNLOCKED, LIMITS)[0].alpha == 5.0
    equal = [Point(LOCK, alpha, measurement(0.0, 0.95)) for alpha in (5.0, 4.0)]
    assert choose(equal, UNLOCKED, LIMITS)[0].alpha == 4.0


def test_every_point_is_measured_under_its_lock_and_the_model_is_left_unlocked() -> None:
    model, seen = tiny_model("llama", seed=3), []
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def measured() -> Measurement:
        handle = handle_of(model)
        seen.append(None if handle is None else (handle.lock, handle.alpha))
        return UNLOCKED

    locks = [base_lock(seed=0), base_lock(seed=1)]
    result = sweep(model, locks, [2.0, 4.0], measured, LIMITS)
    assert seen == [None, *itertools.product(locks, [2.0, 4.0])]
    assert [(point.lock, point.alpha) for point in result.points] == seen[1:]
    assert result.unlocked == UNLOCKED
    assert not result.satisfied
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_empty_sweep_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="at least one"):
        sweep(tiny_model("llama"), [], [1.0], lambda: UNLOCKED, LIMITS)
