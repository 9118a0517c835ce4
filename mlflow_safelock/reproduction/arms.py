"""What is done to a fine-tune to make it safe: the lock, its controls, and what people would do instead."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import torch

from mlflow_safelock.lock import LockedHead, SafetyLock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Vector = Mapping[str, torch.Tensor]
"""A change of weights, by the weights' names."""


class Arm(StrEnum):
    """One way of treating a fine-tune.

    A lock and its controls come twice: at the strength that was chosen once, for all fine-tunes, and at the
    one that was chosen for each.
    """

    UNLOCKED = "fine-tune"
    LOCK = "lock, one strength"
    RANDOM = "random directions, one strength"
    SHUFFLED = "shuffled directions, one strength"
    OWN_LOCK = "lock, own strength"
    OWN_RANDOM = "random directions, own strength"
    OWN_SHUFFLED = "shuffled directions, own strength"
    SYSTEM_PROMPT = "safety system prompt"
    RETRAINED = "re-trained on refusals"
    SUBTRACTED = "harmful task vector subtracted"


@dataclass(frozen=True)
class Treated:
    """A model as one arm measures it.

    Attributes:
        model: The model.
        lock: The lock that is on it while it is measured.
        alpha: Its strength.
        system_prompt: System prompt of every chat.
    """

    model: PreTrainedModel
    lock: SafetyLock | None = None
    alpha: float = 0.0
    system_prompt: str | None = None


def random_lock(lock: SafetyLock, seed: int) -> SafetyLock:
    """The same heads with the same stds, and directions drawn at random: equal norms at any alpha."""
    drawn = np.random.default_rng(seed).standard_normal((len(lock.heads), lock.geometry.head_dim))
    units = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return _with_directions(lock, units.astype(np.float32))


def shuffled_lock(lock: SafetyLock, seed: int) -> SafetyLock:
    """The same heads with the same stds, and each direction at another head than its own.

    A lock of one head stays as it is.
    """
    order = list(range(len(lock.heads)))
    random.Random(seed).shuffle(order)  # noqa: S311 - guards nothing
    directions = np.empty((len(order), lock.geometry.head_dim), np.float32)
    # Each to the next in a random round, so that none stays.
    for place, following in zip(order, (*order[1:], order[0]), strict=True):
        directions[following] = lock.heads[place].direction
    return _with_directions(lock, directions)


def task_vector(base: PreTrainedModel, fine_tune: PreTrainedModel) -> Vector:
    """What a fine-tune changed, ``fine_tune - base``.

    After G. Ilharco et al., "Editing Models with Task Arithmetic", 2023.
    """
    before = dict(base.named_parameters())
    return {name: (weight - before[name]).detach() for name, weight in fine_tune.named_parameters()}


def subtracted(model: PreTrainedModel, vector: Vector, scale: float) -> PreTrainedModel:
    """A copy of a model with ``scale`` times a task vector taken off its weights."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in changed.named_parameters():
            weight.sub_(vector[name], alpha=scale)
    return changed


def _with_directions(lock: SafetyLock, directions: np.ndarray) -> SafetyLock:
    heads = tuple(
        LockedHead(head.layer, head.head, direction, head.std)
        for head, direction in zip(lock.heads, directions, strict=True)
    )
    return SafetyLock(heads, lock.metadata, lock.scores)
