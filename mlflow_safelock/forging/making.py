"""How a lock came about, as its metadata records it."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from mlflow_safelock.apply.alpha import checked_alpha
from mlflow_safelock.forging.splits import RowSplit
from mlflow_safelock.lock import LockMetadata

UNKNOWN_BASE = "unknown"
"""Base model of a lock whose maker did not say. It can be applied by hand, and no gate finds it."""

TOOLS = ("mlflow-safelock", "numpy", "torch", "transformers")
"""Whose versions are recorded, because the numbers may depend on them."""


def forged_metadata(
    split: RowSplit, *, base_model: str | None, created: str | None, default_alpha: float, **values: Any
) -> LockMetadata:
    """The metadata of a lock that is being forged here and now.

    Args:
        split: The split of the probes' rows.
        base_model: Identity of the base model; ``None`` or empty if unknown.
        created: When it was forged, ISO 8601 in UTC; ``None`` for now.
        default_alpha: Strength to recommend.
        values: The fields that are not known from these.

    Raises:
        AlphaError: The strength is no strength.
        LockValidationError: A value is not one that the field takes.
    """
    return LockMetadata.parse(
        {
            **values,
            "base_model": base_model or UNKNOWN_BASE,
            "origin": "forged",
            "split": split.kind,
            "train_fraction": split.train_fraction,
            "seed": split.seed,
            "default_alpha": checked_alpha(default_alpha),
            "created": created or datetime.now(UTC).isoformat(timespec="seconds"),
            "tools": {name: version(name) for name in TOOLS},
        }
    )
