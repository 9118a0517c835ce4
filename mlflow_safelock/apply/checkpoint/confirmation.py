"""Which check confirms a locked checkpoint: loading it, or its structure where it is too big for that."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from mlflow_safelock.apply.checkpoint.biases import Biases
from mlflow_safelock.apply.checkpoint.reload import DEQUANTISED, PLAIN, Confirmation, confirm_by_reloading
from mlflow_safelock.apply.checkpoint.source import CheckpointSource
from mlflow_safelock.apply.checkpoint.structure import confirm_by_structure
from mlflow_safelock.apply.checkpoint.writing import WrittenFile
from mlflow_safelock.errors import CheckpointError
from mlflow_safelock.lock import SafetyLock

Verify = Literal["auto", "reload", "structure"]
"""The check to make: loading, structure, or loading if the model fits."""

RELOAD_LIMIT = 8_000_000_000
"""Bytes of weights up to which ``auto`` loads a model."""

_MODELS_IN_MEMORY = 2.5  # source and locked checkpoint, and what loading and running them takes
_MEMORY = Path("/proc/meminfo")


def checked_verify(verify: str) -> None:
    """Raise CheckpointError if there is no such check."""
    if verify not in get_args(Verify):
        raise CheckpointError(
            f"verify is {verify!r}.", next_step=f"Use one of: {', '.join(get_args(Verify))}."
        )


def confirm(
    verify: Verify,
    source: CheckpointSource,
    written: Iterable[WrittenFile],
    biases: Biases,
    folder: Path,
    lock: SafetyLock,
    alpha: float,
) -> Confirmation:
    """Make the check.

    Raises:
        CheckpointError: The checkpoint is not as it should be.
    """
    if verify == "reload" or (verify == "auto" and _fits(source)):
        slack = PLAIN if source.fp8 is None else DEQUANTISED
        return confirm_by_reloading(source.layout.model, folder, lock, alpha, slack)
    return confirm_by_structure(source, written, biases, folder)


def _fits(source: CheckpointSource) -> bool:
    # Weights of eight bits take twice their bytes where no kernel for them is there.
    size = source.weights.size * (1 if source.fp8 is None else 2)
    available = _available_memory()
    return size <= RELOAD_LIMIT and (available is None or size * _MODELS_IN_MEMORY <= available)


def _available_memory() -> int | None:
    """Bytes that can be had without swapping; ``None`` where the system does not say."""
    if not _MEMORY.is_file():
        return None
    lines = _MEMORY.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
