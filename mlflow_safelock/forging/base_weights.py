"""What a lock keeps of its base's weights: the kinship sketch, and the bias that each locked head makes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from mlflow_safelock.apply.architectures import Attention
from mlflow_safelock.apply.carriers import is_plain_matrix
from mlflow_safelock.apply.displacement import Displacement, Workspace, head_weight_of, output_bias
from mlflow_safelock.forging.offloaded import brought_in
from mlflow_safelock.kinship import KinshipSketch, cosine, sampled_layers, sampled_offsets
from mlflow_safelock.lock import LockedHead


def sketch_of(attention: Attention) -> KinshipSketch | None:
    """Sample the output projections of a loaded or offloaded model; ``None`` where one is no plain matrix."""
    layers = sampled_layers(attention.geometry.layers)
    offsets, values = [], []
    for layer in layers.tolist():
        projection = attention.projections[layer]
        with brought_in(projection):
            if not is_plain_matrix(projection, attention.geometry):
                return None
            stored = projection.weight.detach().flatten()
            starts, length = sampled_offsets(layer, stored.numel())
            offsets.append(starts)
            values.append([stored[start : start + length].float().cpu().numpy() for start in starts.tolist()])
    return KinshipSketch(layers, np.array(offsets), np.array(values, dtype=np.float16))


def kinship_of(attention: Attention, sketch: KinshipSketch) -> float | None:
    """How alike a loaded model's output projections are to those that a sketch was taken of.

    Args:
        attention: The model's attention; of a projection with an adapter on it, what is below counts.
        sketch: The base's sketch, of a model of the same shape.

    Returns:
        Cosine, -1 to 1; ``None`` where a projection is not a plain matrix in memory.
    """
    length, values = sketch.values.shape[2], []
    for layer, starts in zip(sketch.layers.tolist(), sketch.offsets.tolist(), strict=True):
        projection = attention.projections[layer]
        while isinstance(getattr(projection, "base_layer", None), torch.nn.Module):
            projection = projection.base_layer
        with brought_in(projection):
            if not is_plain_matrix(projection, attention.geometry):
                return None
            stored = projection.weight.detach().flatten()
            values.append([stored[start : start + length].float().cpu().numpy() for start in starts])
    return cosine(sketch, np.array(values))


def unit_biases_of(attention: Attention, heads: Sequence[LockedHead]) -> npt.NDArray[np.float32] | None:
    """``W_o d`` of every head, the bias that its direction makes at the output of the projection.

    Args:
        attention: The base's attention.
        heads: The locked heads, sorted by layer, then head.

    Returns:
        float32 ``[K, hidden]``; ``None`` where a projection is no plain matrix.
    """
    geometry, space = attention.geometry, Workspace()
    biases = []
    for locked in heads:
        projection = attention.projections[locked.layer]
        with brought_in(projection):
            if not is_plain_matrix(projection, geometry):
                return None
            weight = projection.weight
            assert isinstance(weight, torch.Tensor)  # that is what a plain matrix is
            head_weight = head_weight_of(weight, geometry.head_dim, attention.architecture.layout)
            # Copied, because the last bit of a product depends on where in memory its matrix begins.
            columns = head_weight(locked.head).detach().clone(memory_format=torch.contiguous_format)
        direction = torch.from_numpy(locked.direction.astype(np.float64))[None]
        unit = Displacement(locked.layer, (locked.head,), direction)
        biases.append(output_bias({locked.head: columns}.__getitem__, unit, space).float().cpu().numpy())
    return np.stack(biases)
