"""The sketch of a base model: a few of its weights, by which a descendant is told from a stranger.

Fine-tuning moves weights by little, so a sample of a fine-tune's attention output projections points the
same way as the base's at the same places (cosine near 1), and a sample of another model's does not (cosine
near 0). Runs of neighbouring numbers are sampled, so that a reader of a checkpoint fetches few and short
ranges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_safelock.errors import LockValidationError

MAX_LAYERS = 16
"""Most layers that are sampled; evenly spread over the model."""

RUNS = 4
"""Runs of neighbouring numbers in each layer's output projection."""

MIN_KINSHIP = 0.5
"""Cosine from which a model counts as a descendant: far above strangers, and far below any fine-tune."""

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

RUN_LENGTH = 512
"""Numbers in each run, where the weight is large enough."""


@dataclass(frozen=True, eq=False)
class KinshipSketch:
    """Some weights of a base model's attention output projections, as they are stored.

    Attributes:
        layers: int32 ``[layers]``, ascending; the sampled layers.
        offsets: int64 ``[layers, runs]``; where each run begins in the layer's weight, counted in numbers of
            the stored matrix read row by row (``[hidden, heads * head_dim]`` for a Linear).
        values: float16 ``[layers, runs, length]``; the numbers of each run.

    Raises:
        LockValidationError: Shapes that do not belong together, layers out of order, an offset below zero, a
            number that is not finite, or nothing but zeros.
    """

    layers: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    values: npt.NDArray[np.float16]

    def __post_init__(self) -> None:
        kept = {
            "layers": np.ascontiguousarray(self.layers, dtype="<i4"),
            "offsets": np.ascontiguousarray(self.offsets, dtype="<i8"),
            "values": np.ascontiguousarray(self.values, dtype="<f2"),
        }
        for name, array in kept.items():
            # Over immutable bytes: unlike a read-only flag, that cannot be switched back.
            own = np.frombuffer(array.tobytes(), dtype=array.dtype).reshape(array.shape)
            object.__setattr__(self, name, own)
        if self.values.ndim != 3 or 0 in self.values.shape:
            raise LockValidationError("The kinship sketch holds no runs of numbers.")
        if self.offsets.shape != self.values.shape[:2] or self.layers.shape != self.values.shape[:1]:
            raise LockValidationError("The kinship sketch's layers, offsets and values differ in number.")
        if (np.diff(self.layers) <= 0).any() or self.layers[0] < 0 or (self.offsets < 0).any():
            raise LockValidationError("The kinship sketch's layers or offsets are out of order.")
        if not np.isfinite(self.values).all() or not self.values.any():
            raise LockValidationError("The kinship sketch holds numbers that no weights are.")


def sampled_layers(layers: int) -> npt.NDArray[np.int32]:
    """Which layers of a model of so many layers are sampled: the first, the last, and some between."""
    return np.unique(np.linspace(0, layers - 1, min(layers, MAX_LAYERS)).round()).astype(np.int32)


def sampled_offsets(layer: int, numbers: int) -> tuple[npt.NDArray[np.int64], int]:
    """Where the runs of a layer's weight begin, and how long each is.

    The places follow from the layer and the size alone, so that a base is always sampled in the same places.

    Args:
        layer: Index of the layer.
        numbers: How many numbers its weight has.
    """
    part = numbers // RUNS
    length = max(1, min(RUN_LENGTH, part))
    # Multiples of the golden ratio: spread out, and different in every layer.
    fractions = [(layer * RUNS + run + 1) * GOLDEN_RATIO % 1 for run in range(RUNS)]
    starts = [
        run * part + math.floor(fraction * (part - length + 1)) for run, fraction in enumerate(fractions)
    ]
    return np.array(starts, dtype=np.int64), length


def cosine(sketch: KinshipSketch, values: npt.NDArray[Any]) -> float:
    """How alike a model's weights are to the base's in the sampled places, -1 to 1.

    Args:
        sketch: The base's sketch.
        values: The model's numbers in the same places, ``[layers, runs, length]``.

    Returns:
        The cosine of the angle between the two samples; 0 where the model's are all zero.
    """
    ours, theirs = sketch.values.astype(np.float64).ravel(), np.asarray(values, dtype=np.float64).ravel()
    length = np.linalg.norm(ours) * np.linalg.norm(theirs)
    return float(ours @ theirs / length) if length > 0 else 0.0
