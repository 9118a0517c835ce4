"""What was written, and how it was confirmed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlflow_safelock.apply.checkpoint.sharing import Sharing
from mlflow_safelock.apply.checkpoint.writing import WrittenFile


@dataclass(frozen=True)
class CheckpointReport:
    """A locked checkpoint that was written and confirmed.

    Attributes:
        folder: Where it is.
        files: Names of its files.
        left_out: Files of the source that were not carried over.
        carrier: How the checkpoint holds the biases, in words.
        biases: Number of layers with a bias from the lock.
        lock: Digest of the lock.
        alpha: Its strength.
        check: The check that confirmed it, in words.
        max_logit_difference: Largest difference between the logits of the folder, loaded by stock
            ``transformers``, and of the source with the lock applied in memory. ``None`` where it was not
            loaded.
        max_logit_change: Largest change that the lock makes to the same logits; ``None`` where it was not
            loaded.
        verified: Which check it was: ``reload`` or ``structure``.
        weights: The source's files of weights, as they are in the folder.
        shared: How each of the source's files of weights came into the folder, by its name there.
        bytes_written: Bytes that the folder takes beyond what it shares with the source.
        bias_error: Largest distance of a stored bias from the one computed in float64, relative to the
            length of that: what rounding to the checkpoint's dtype costs.
    """

    folder: Path
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    carrier: str
    biases: int
    lock: str
    alpha: float
    check: str
    max_logit_difference: float | None
    max_logit_change: float | None
    verified: Literal["reload", "structure"]
    weights: tuple[WrittenFile, ...]
    shared: Mapping[str, Sharing]
    bytes_written: int
    bias_error: float
