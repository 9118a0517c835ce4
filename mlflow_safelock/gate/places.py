"""What the places of locked models are called: beside the fine-tune, in a folder named after it."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from mlflow_safelock.errors import PromotionRefused

STANDALONE = "standalone-"
"""Beginning of the last part of a standalone model's location."""

BESIDE = "-safelock"
"""What the folder of locked models beside a fine-tune is called after it."""

_DIGITS = "[0-9a-f]{32}"

LOCKED_FOLDER = re.compile(rf"(?:{STANDALONE})?{_DIGITS}|\.(?:{STANDALONE})?{_DIGITS}-{_DIGITS}")
"""Names in that folder which this package gives: overlays, standalone models, and either as it is written."""

MAX_LOCATION = 500
"""Longest download location that MLflow's table holds, in characters."""


def folder_beside(original: str) -> str:
    """Where the locked models of a fine-tune are."""
    return f"{original.rstrip('/')}{BESIDE}"


def is_standalone(location: str | None) -> bool:
    """Whether a location is one of a standalone model."""
    return PurePosixPath(location or "").name.startswith(STANDALONE)


def beside(original: str, name: str) -> str:
    """Where something lies that was made of the fine-tune at ``original``.

    Raises:
        PromotionRefused: That is longer than MLflow's table holds.
    """
    location = f"{folder_beside(original)}/{name}"
    if len(location) > MAX_LOCATION:
        raise PromotionRefused(
            "location_too_long",
            f"The locked model's location would have {len(location)} characters, and MLflow holds "
            f"{MAX_LOCATION}.",
            next_step="Log the model under a shorter artifact location.",
        )
    return location


def fine_tune_beside(location: str) -> str | None:
    """Where the fine-tune is beside which a locked model lies; ``None`` where that is no place of one.

    By its name alone: anybody may have put anything there.
    """
    folder, _, name = location.rstrip("/").rpartition("/")
    if LOCKED_FOLDER.fullmatch(name) is None or name.startswith(".") or not folder.endswith(BESIDE):
        return None
    return folder.removesuffix(BESIDE)
