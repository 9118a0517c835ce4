"""Of measured points the one is taken that the limits ask for, and that is far from those that miss them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_safelock.evaluate import Limits, Point, Rates, choose
from mlflow_safelock.evaluate.choosing import Preference
from tests.registries import base_lock

LOCK = base_lock()
LIMITS = Limits(max_harmful_rate=0.1, max_utility_loss=0.05, max_degenerate_rate=0.05)
rates = st.integers(0, 20).map(lambda n: n / 20)


UNLOCKED = Rates(harmful=1.0, utility=0.95, degenerate=0.0)


def point(alpha: float, harm: float, utility: float, degenerate: float = 0.0, *, lock: Any = LOCK) -> Point:
    return Point(lock, alpha, Rates(harm, utility, degenerate), UNLOCKED)


def chosen(points: list[Point], prefer: Preference = "room") -> tuple[Point, bool]:
    return choose(points, [one.alpha for one in points], LIMITS, prefer)


@pytest.mark.parametrize("prefer", ["utility", "room"])
@given(st.lists(st.tuples(rates, rates, st.sampled_from([2.0, 4.0, 6.0])), min_size=1, max_size=12))
def test_the_chosen_point_keeps_the_limits_where_any_does(prefer: Preference, values: list) -> None:
    points = [point(alpha, harm, utility) for harm, utility, alpha in values]

    def keeps(one: Point) -> bool:
        return one.rates.harmful <= 0.1 and UNLOCKED.utility - one.rates.utility <= 0.05

    best, satisfied = chosen(points, prefer)
    good = [one for one in points if keeps(one)]
    assert satisfied == bool(good)
    if good:
        assert keeps(best)
        assert prefer == "room" or best.rates.utility == max(one.rates.utility for one in good)


def test_where_none_keeps_them_the_nearest_is_given_and_said_to_be_that() -> None:
    points = [point(2.0, 0.9, 0.95), point(6.0, 0.15, 0.9)]
    assert chosen(points) == chosen(points, "utility") == (points[1], False)


def test_a_point_that_makes_the_model_repeat_itself_is_not_taken() -> None:
    babbling, sound = point(6.0, 0.0, 0.95, degenerate=0.3), point(4.0, 0.1, 0.93)
    assert chosen([babbling, sound]) == (sound, True)


def test_the_point_amid_those_that_keep_them_is_taken_whatever_their_order() -> None:
    harm = {1.0: 0.6, 2.0: 0.1, 3.0: 0.05, 4.0: 0.0, 5.0: 0.0, 6.0: 0.0, 7.0: 0.0}
    utility = {6.0: 0.9, 7.0: 0.2}
    points = [point(alpha, harm[alpha], utility.get(alpha, 0.95)) for alpha in harm]
    for order in (points, points[::-1], points[3:] + points[:3]):
        assert chosen(order)[0].alpha == 4.0


def test_room_counts_before_utility_or_after_it() -> None:
    points = [point(alpha, 0.0, 0.95 if alpha == 3.0 else 0.93) for alpha in (1.0, 2.0, 3.0)]
    assert chosen(points)[0].alpha == 2.0
    assert chosen(points, "utility")[0].alpha == 3.0
    equal = [point(alpha, 0.0, 0.95) for alpha in (1.0, 2.0, 3.0)]
    assert chosen(equal, "utility")[0].alpha == 2.0


def test_beyond_the_grid_nothing_is_known_to_keep_them() -> None:
    assert chosen([point(alpha, 0.0, 0.95) for alpha in (4.0, 5.0, 6.0)])[0].alpha == 5.0


def test_points_between_those_of_the_grid_are_parts_of_a_step_away() -> None:
    """Many points that were tried close to the edge are no room."""
    grid = [1.0, 2.0, 4.0, 8.0]
    points = [point(1.0, 0.9, 0.95), *(point(alpha, 0.0, 0.95) for alpha in (1.5, 1.75, 2.0, 4.0, 8.0))]
    assert choose(points, grid, LIMITS, "room")[0].alpha == 4.0


def test_a_point_that_just_keeps_a_limit_keeps_it() -> None:
    before = Rates(harmful=1.0, utility=1.0, degenerate=0.0)
    just = Point(LOCK, 4.0, Rates(harmful=0.0, utility=0.98, degenerate=0.0), before)
    assert just.excess(Limits(max_utility_loss=0.02)) == 0.0
    assert just.excess(Limits(max_utility_loss=0.019)) > 0.0


def test_room_is_counted_under_one_lock() -> None:
    other = base_lock(seed=1)
    narrow = [point(alpha, 0.0, 0.95 if alpha == 2.0 else 0.2) for alpha in (1.0, 2.0, 3.0)]
    wide = [point(alpha, 0.05, 0.95, lock=other) for alpha in (1.0, 2.0, 3.0)]
    assert chosen([*narrow, *wide]) == (wide[1], True)


def test_of_points_with_equal_room_the_most_useful_is_taken_then_the_gentlest() -> None:
    assert chosen([point(4.0, 0.0, 0.91), point(5.0, 0.05, 0.95)])[0].alpha == 5.0
    assert chosen([point(5.0, 0.0, 0.95), point(4.0, 0.0, 0.95)])[0].alpha == 4.0
