from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_safelock.errors import ForgeError
from mlflow_safelock.forging import RowSplit, given_split, split_by_pair, split_by_row

FRACTIONS = st.floats(0.3, 0.7)
SEEDS = st.integers(0, 2**53 - 1)


def sides(split: RowSplit) -> list[int]:
    for side in (split.train, split.validation):
        assert side.dtype == np.int64
        assert (np.diff(side) > 0).all()
    return sorted([*split.train.tolist(), *split.validation.tolist()])


@given(pairs=st.integers(2, 60), rows=st.integers(1, 10), fraction=FRACTIONS, seed=SEEDS)
def test_a_split_by_pair_keeps_every_pair_on_one_side(
    pairs: int, rows: int, fraction: float, seed: int
) -> None:
    numbers = np.repeat(np.arange(pairs), rows)
    split = split_by_pair(numbers, fraction, seed)
    assert sides(split) == list(range(pairs * rows))
    assert set(numbers[split.train]) & set(numbers[split.validation]) == set()
    assert len(set(numbers[split.train])) == round(pairs * fraction)
    assert (split.kind, split.seed, split.train_fraction) == ("pair", seed, fraction)


@given(rows=st.integers(2, 300), fraction=FRACTIONS, seed=SEEDS)
def test_a_split_by_row_has_every_row_once(rows: int, fraction: float, seed: int) -> None:
    split = split_by_row(rows, fraction, seed)
    assert sides(split) == list(range(rows))
    assert len(split.train) == round(rows * fraction)
    assert (split.kind, split.seed, split.train_fraction) == ("row", seed, fraction)


def test_pairs_may_have_any_numbers_in_any_order() -> None:
    numbers = [7, -2, 7, 40, -2, 40, 11, 11]
    split = split_by_pair(numbers, 0.5, 3)
    train = {numbers[row] for row in split.train}
    assert len(train) == 2
    assert {numbers[row] for row in split.validation} == {7, -2, 40, 11} - train


def test_the_seed_decides_the_draw() -> None:
    numbers = np.repeat(np.arange(50), 4)
    for draw in (lambda seed: split_by_pair(numbers, 0.6, seed), lambda seed: split_by_row(200, 0.6, seed)):
        np.testing.assert_array_equal(draw(1).train, draw(1).train)
        assert not np.array_equal(draw(1).train, draw(2).train)


@pytest.mark.parametrize(("available", "fraction"), [(0, 0.6), (1, 0.6), (1, 0.2), (2, 0.9), (3, 0.1)])
def test_a_side_without_pairs_is_refused(available: int, fraction: float) -> None:
    with pytest.raises(ForgeError, match=f"{available} pairs are too few"):
        split_by_pair(np.repeat(np.arange(available), 6), fraction, 0)
    with pytest.raises(ForgeError, match=f"{available} rows are too few"):
        split_by_row(available, fraction, 0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_fraction_must_be_one(fraction: float) -> None:
    with pytest.raises(ForgeError, match="train_fraction must lie between 0 and 1"):
        split_by_row(100, fraction, 0)


@pytest.mark.parametrize("seed", [-1, 2**53, 1.5, "7", True, None])
def test_a_seed_must_be_a_whole_number_that_a_lock_can_record(seed: Any) -> None:
    with pytest.raises(ForgeError, match="seed must be a whole number"):
        split_by_row(100, 0.6, seed)


def test_a_given_split_is_taken_as_it_is() -> None:
    split = given_split([8, 0, 3], np.array([1, 9], dtype=np.int32), 10)
    assert split.train.tolist() == [0, 3, 8]
    assert split.validation.tolist() == [1, 9]
    assert (split.kind, split.seed, split.train_fraction) == ("given", None, 0.6)


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ([0, 1], None, "only make a split together"),
        (None, [0, 1], "only make a split together"),
        ([0, 1], [1, 2], "1 rows are in both train_rows and val_rows, row 1 for one"),
        ([0, 10], [1, 2], "train_rows holds row 10, and the rows are 0 to 9"),
        ([0, 1], [-1, 2], "val_rows holds row -1"),
        ([0, 0], [1, 2], "train_rows holds row 0 more than once"),
        ([], [1, 2], "train_rows must be a list of row numbers"),
        ([0.0, 1.0], [2, 3], "train_rows must be a list of row numbers"),
        ([True, False], [2, 3], "train_rows must be a list of row numbers"),
        ([[0], [1]], [2, 3], "train_rows must be a list of row numbers"),
    ],
)
def test_a_given_split_that_is_none_is_refused(train: Any, validation: Any, message: str) -> None:
    with pytest.raises(ForgeError, match=message):
        given_split(train, validation, 10)
