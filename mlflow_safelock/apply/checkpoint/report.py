"""What was written, and how it was confirmed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
            ``transformers``, and of the source with the lock applied in memory.
        max_logit_change: Largest change that the lock makes to the same logits.
    """

    folder: Path
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    carrier: str
    biases: int
    lock: str
    alpha: float
    check: str
    max_logit_difference: float
    max_logit_change: float
