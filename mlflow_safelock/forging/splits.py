"""Which rows the probes are fitted on and which they are validated on (METHOD, forge step 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlflow_safelock.errors import ForgeError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RowSplit:
    """Rows to fit on and rows to validate on.

    Attributes:
        train: int64, ascending.
        validation: int64, ascending, none of them in ``train``.
        kind: How it was made: by ``pair``, by ``row``, or ``given`` by the caller.
        train_fraction: Share of the pairs or rows that was asked to be in ``train``, or that is there.
        seed: Seed of the draw; ``None`` where nothing was drawn.
    """

    train: Indices
    validation: Indices
    kind: Literal["pair", "row", "given"]
    train_fraction: float
    seed: int | None


def split_by_pair(pairs: Any, train_fraction: float, seed: int) -> RowSplit:
    """Draw whole pairs for training, so that no pair has rows on both sides.

    Args:
        pairs: ``[rows]`` of integers; rows with the same number belong together.
        train_fraction: Share of the pairs that goes to training, rounded to a whole number of pairs.
        seed: Seed of the draw (NumPy's PCG64).

    Raises:
        ForgeError: A side would be empty, or the fraction or the seed is out of range.
    """
    numbers, row_numbers = np.unique(np.asarray(pairs), return_inverse=True)
    drawn = _draw(len(numbers), train_fraction, seed, "pairs")
    is_train = np.isin(row_numbers, drawn)
    return RowSplit(np.flatnonzero(is_train), np.flatnonzero(~is_train), "pair", train_fraction, seed)


def split_by_row(rows: int, train_fraction: float, seed: int) -> RowSplit:
    """Draw single rows for training, as the method's authors do.

    Tokens of one answer then lie on both sides, which makes the validation accuracy look better than it is.

    Args:
        rows: Number of rows.
        train_fraction: Share of the rows that goes to training, rounded to a whole number of rows.
        seed: Seed of the draw (NumPy's PCG64).

    Raises:
        ForgeError: A side would be empty, or the fraction or the seed is out of range.
    """
    drawn = _draw(rows, train_fraction, seed, "rows")
    return RowSplit(np.sort(drawn), np.setdiff1d(np.arange(rows), drawn), "row", train_fraction, seed)


def drawn_split(kind: str, pairs: Any, rows: int, train_fraction: float, seed: int) -> RowSplit:
    """A split drawn by ``pair`` or by ``row``.

    Args:
        kind: Which of the two.
        pairs: ``[rows]`` of integers, for a split by pair.
        rows: Number of rows.
        train_fraction: Share of pairs or rows that goes to training.
        seed: Seed of the draw.

    Raises:
        ForgeError: Another kind, a side would be empty, or the fraction or the seed is out of range.
    """
    if kind == "pair":
        return split_by_pair(pairs, train_fraction, seed)
    if kind == "row":
        return split_by_row(rows, train_fraction, seed)
    raise ForgeError(f"split must be 'pair' or 'row', not {kind!r}.")


def given_split(train_rows: Any, val_rows: Any, rows: int) -> RowSplit:
    """The split that the caller made.

    Args:
        train_rows: Indices of rows.
        val_rows: Indices of other rows. Rows may be left out of both.
        rows: Number of rows.

    Raises:
        ForgeError: Only one side is given, indices are no whole numbers, out of range or repeated, or a row
            is on both sides.
    """
    if train_rows is None or val_rows is None:
        raise ForgeError(
            "train_rows and val_rows only make a split together.", next_step="Give both or none."
        )
    train, validation = _indices(train_rows, rows, "train_rows"), _indices(val_rows, rows, "val_rows")
    shared = np.intersect1d(train, validation)
    if shared.size:
        raise ForgeError(
            f"{shared.size} rows are in both train_rows and val_rows, row {shared[0]} for one.",
            next_step="Validate on rows that the probes are not fitted on.",
        )
    return RowSplit(train, validation, "given", train.size / (train.size + validation.size), None)


def _draw(available: int, train_fraction: float, seed: int, unit: str) -> Indices:
    try:
        is_share = 0.0 < train_fraction < 1.0
    except TypeError:
        is_share = False
    if not is_share:
        raise ForgeError(f"train_fraction must lie between 0 and 1, not {train_fraction!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**53:
        raise ForgeError(f"seed must be a whole number from 0 to 2**53 - 1, not {seed!r}.")
    wanted = round(available * train_fraction)
    if not 0 < wanted < available:
        raise ForgeError(
            f"{available} {unit} are too few: probes are fitted on {train_fraction:.0%} of them and "
            "validated on the rest.",
            next_step="Use more preference pairs; the paper uses 100.",
        )
    return np.random.default_rng(seed).permutation(available)[:wanted]


def _indices(given: Any, rows: int, name: str) -> Indices:
    indices = np.asarray(given)
    if indices.ndim != 1 or indices.size == 0 or indices.dtype.kind not in "iu":
        raise ForgeError(f"{name} must be a list of row numbers.")
    if indices.min() < 0 or indices.max() >= rows:
        outside = indices.min() if indices.min() < 0 else indices.max()
        raise ForgeError(f"{name} holds row {outside}, and the rows are 0 to {rows - 1}.")
    indices = np.sort(indices.astype(np.int64))
    repeated = indices[1:][indices[1:] == indices[:-1]]
    if repeated.size:
        raise ForgeError(f"{name} holds row {repeated[0]} more than once.")
    return indices
