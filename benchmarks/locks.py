"""The locks that are measured with: the published ones, or random ones of the same form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlflow_safelock import SafetyLock, import_published_lock
from mlflow_safelock.lock import AttentionGeometry
from tests.models import random_lock


@dataclass(frozen=True)
class PublishedLock:
    """A lock that the method's authors published.

    Attributes:
        title: Its model, for people.
        base_model: Its base model's hub id.
        file: Name of its file.
        geometry: The base's attention shape.
        heads: How many heads it locks.
    """

    title: str
    base_model: str
    file: str
    geometry: AttentionGeometry
    heads: int


LLAMA_3_8B = PublishedLock(
    "Llama-3-8B",
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "Meta-Llama-3-8B-Instruct.safelock",
    AttentionGeometry(layers=32, heads=32, head_dim=128, hidden=4096),
    24,
)
LLAMA_3_70B = PublishedLock(
    "Llama-3-70B",
    "meta-llama/Meta-Llama-3-70B-Instruct",
    "Meta-Llama-3-70B-Instruct.safelock",
    AttentionGeometry(layers=80, heads=64, head_dim=128, hidden=8192),
    24,
)


def lock_for(published: PublishedLock, folder: Path | None) -> tuple[SafetyLock, str]:
    """The lock, and a word on where it comes from.

    Args:
        published: The published lock.
        folder: Folder of the published files; without it the lock is a random one of the same form.
    """
    if folder is None:
        return random_lock(
            published.geometry, published.heads, base_model=published.base_model
        ), "random lock"
    return import_published_lock(folder / published.file, base_model=published.base_model), "published lock"
