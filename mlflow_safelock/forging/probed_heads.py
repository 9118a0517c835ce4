"""A model's heads, probed: everything a lock is made of but the number of heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
import torch

from mlflow_safelock.apply.architectures import Attention
from mlflow_safelock.errors import ForgeError
from mlflow_safelock.forging.base_weights import sketch_of, unit_biases_of
from mlflow_safelock.forging.directions import locked_head
from mlflow_safelock.forging.probes import ProbeScores
from mlflow_safelock.lock import AttentionGeometry, LockMetadata, SafetyLock


@dataclass(frozen=True, eq=False)
class ProbedHeads:
    """Activations, what the probes make of them, and how they came about.

    Locks of any size come out of one pass over the model::

        probed = probe_model(model, tokenizer, pairs)
        small, large = probed.lock(heads=24), probed.lock(heads=48)

    Attributes:
        activations: ``[rows, layers, heads, head_dim]``, on the CPU.
        labels: ``[rows]``; 1 safe, 0 unsafe.
        scores: What the probes get right.
        metadata: How the activations came about; the same for locks of every size.
        attention: The base's attention, for what a lock keeps of its weights; ``None`` where it is unknown.
    """

    activations: torch.Tensor
    labels: torch.Tensor
    scores: ProbeScores
    metadata: LockMetadata
    attention: Attention | None = None

    @overload
    def locks(self, heads: int) -> SafetyLock: ...

    @overload
    def locks(self, heads: tuple[int, ...]) -> tuple[SafetyLock, ...]: ...

    def locks(self, heads: int | tuple[int, ...]) -> SafetyLock | tuple[SafetyLock, ...]:
        """One lock for a number of heads, several for several numbers; see ``lock``."""
        return tuple(map(self.lock, heads)) if isinstance(heads, tuple) else self.lock(heads)

    def lock(self, heads: int = 24) -> SafetyLock:
        """The lock of the best heads (METHOD, forge steps 5 and 6).

        Args:
            heads: How many heads (``K`` in the paper: 24 for 8 to 12 billion parameters, 24 or 48 for 70).

        Raises:
            ForgeError: The model has not as many heads, or one of them has no direction.
        """
        check_heads(heads, self.metadata.geometry)
        locked = tuple(
            locked_head(self.activations[:, layer, head], self.labels, layer, head)
            for layer, head in self.scores.best_heads(heads)
        )
        scores = self.scores.scores.astype(np.float32)
        if self.attention is None:
            return SafetyLock(locked, self.metadata, scores)
        unit_biases, sketch = unit_biases_of(self.attention, locked), sketch_of(self.attention)
        return SafetyLock(locked, self.metadata, scores, unit_biases, sketch)


def check_heads(heads: int | tuple[int, ...], geometry: AttentionGeometry) -> None:
    """Raise unless a model of this shape has so many heads, or each of so many.

    Raises:
        ForgeError: It has not, or ``heads`` is not a whole number above zero, nor a tuple of such.
    """
    if isinstance(heads, tuple):
        if not heads:
            raise ForgeError("heads must name at least one number of heads.")
        for count in heads:
            check_heads(count, geometry)
        return
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ForgeError(f"heads must be a whole number above zero, not {heads!r}.")
    available = geometry.layers * geometry.heads
    if heads > available:
        raise ForgeError(
            f"{heads} heads are asked for, and the model has {available} ({geometry}).",
            next_step="Lock fewer; a lock of every head leaves nothing of the model's skill.",
        )
