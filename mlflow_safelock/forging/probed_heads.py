"""A model's heads, probed: everything a lock is made of but the number of heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mlflow_safelock.errors import ForgeError
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
    """

    activations: torch.Tensor
    labels: torch.Tensor
    scores: ProbeScores
    metadata: LockMetadata

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
        return SafetyLock(locked, self.metadata, self.scores.scores.astype(np.float32))


def check_heads(heads: int, geometry: AttentionGeometry) -> None:
    """Raise unless a model of this shape has so many heads.

    Raises:
        ForgeError: It has not, or ``heads`` is not a whole number above zero.
    """
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ForgeError(f"heads must be a whole number above zero, not {heads!r}.")
    available = geometry.layers * geometry.heads
    if heads > available:
        raise ForgeError(
            f"{heads} heads are asked for, and the model has {available} ({geometry}).",
            next_step="Lock fewer; a lock of every head leaves nothing of the model's skill.",
        )
