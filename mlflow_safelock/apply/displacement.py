"""The arithmetic of a lock: what it adds to the heads of a layer, and what that makes of the layer's output.

For a locked layer ``l`` the lock displaces the input of the attention output projection by
``v_l = concat_h(alpha * std_h * direction_h)``, zero for heads that are not locked. The projection is linear,
so that is a constant at its output: ``W_o (x + v_l) = W_o x + bias_l`` with ``bias_l = W_o v_l`` (arXiv
2410.10343, section 3; METHOD, "Apply").

Only the columns of ``W_o`` that belong to locked heads contribute, so only those are read, one head at a
time, and products are summed in float64: the bias is as exact as the numbers it is stored in allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from mlflow_safelock.errors import AlphaError
from mlflow_safelock.lock import AttentionGeometry, SafetyLock

HeadWeight = Callable[[int], torch.Tensor]
"""Gives the columns of ``W_o`` that belong to a head, ``[hidden, head_dim]``, in the weight's own dtype."""


@dataclass(frozen=True, eq=False)
class Displacement:
    """What a lock adds to the heads of one layer, ``v_l`` without its zeros.

    Attributes:
        layer: Index of the decoder layer.
        heads: Indices of the locked query heads, ascending.
        values: ``alpha * std * direction`` of each, float64 of shape ``[len(heads), head_dim]``, on the CPU.
    """

    layer: int
    heads: tuple[int, ...]
    values: torch.Tensor


def displacements(lock: SafetyLock, alpha: float) -> tuple[Displacement, ...]:
    """What ``lock`` at strength ``alpha`` adds, for every layer that holds a locked head, by layer."""
    return tuple(_displacement(lock, layer, alpha) for layer in lock.layers)


def output_bias(head_weight: HeadWeight, displacement: Displacement) -> torch.Tensor:
    """The bias that a displacement is at the output of the projection, ``bias_l = W_o v_l``.

    Args:
        head_weight: Gives the columns of ``W_o`` for a head; asked for the locked heads only.
        displacement: The layer's displacement.

    Returns:
        Float64 of shape ``[hidden]``, on the weight's device (float32 where that device has no float64).
    """
    terms = (
        _product(head_weight(head), values)
        for head, values in zip(displacement.heads, displacement.values, strict=True)
    )
    return torch.stack(tuple(terms)).sum(dim=0)


def stored_bias(bias: torch.Tensor, dtype: torch.dtype, layer: int, alpha: float) -> torch.Tensor:
    """Round a bias to the dtype that it is stored in.

    Args:
        bias: The bias, in float64.
        dtype: The dtype to store it in.
        layer: The layer that it is for, for the error.
        alpha: The strength that it was computed for, for the error.

    Raises:
        AlphaError: A number of it is beyond what the dtype can hold.
    """
    if not bias.abs().max() <= torch.finfo(dtype).max:
        raise AlphaError(
            f"At alpha {alpha} the bias of layer {layer} is beyond what {dtype} can hold.",
            next_step="Use a smaller alpha, or weights of a wider dtype.",
        )
    return bias.to(dtype)


def input_displacement(displacement: Displacement, geometry: AttentionGeometry) -> torch.Tensor:
    """The displacement with its zeros, ``v_l``: float64 of shape ``[heads * head_dim]``, on the CPU."""
    full = torch.zeros(geometry.heads, geometry.head_dim, dtype=torch.float64)
    full[list(displacement.heads)] = displacement.values
    return full.flatten()


def head_weight_of(weight: torch.Tensor, head_dim: int, layout: Literal["linear", "conv1d"]) -> HeadWeight:
    """Read the columns of heads out of a weight in memory.

    Args:
        weight: ``W_o``, of shape ``[hidden, heads * head_dim]``, or transposed for ``conv1d``.
        head_dim: Width of a head.
        layout: How the weight is laid out.
    """
    if layout == "linear":
        return lambda head: weight[:, head_columns(head, head_dim)]
    return lambda head: weight[head_columns(head, head_dim)].T


def head_columns(head: int, head_dim: int) -> slice:
    """Where a head's output lies in the input of the output projection."""
    return slice(head * head_dim, (head + 1) * head_dim)


def _displacement(lock: SafetyLock, layer: int, alpha: float) -> Displacement:
    heads = lock.heads_of_layer(layer)
    values = torch.stack(
        [alpha * locked.std * torch.tensor(locked.direction, dtype=torch.float64) for locked in heads]
    )
    return Displacement(layer, tuple(locked.head for locked in heads), values)


def _product(columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    columns = columns.detach()
    accumulator = torch.float32 if columns.device.type == "mps" else torch.float64
    # A head's columns lie scattered over the rows of a Linear weight. Gathering them first, in the narrow
    # dtype, and widening the gathered block takes half the time of widening while gathering.
    block = columns.contiguous() if columns.stride(-1) == 1 else columns
    return torch.mv(block.to(accumulator), values.to(columns.device, accumulator))
