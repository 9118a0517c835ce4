"""The arithmetic of a lock: what it adds to the heads of a layer, and what that makes of the layer's output.

For a locked layer ``l`` the lock displaces the input of the attention output projection by
``v_l = concat_h(alpha * std_h * direction_h)``, zero for heads that are not locked. The projection is linear,
so that is a constant at its output: ``W_o (x + v_l) = W_o x + bias_l`` with ``bias_l = W_o v_l`` (arXiv
2410.10343, section 3; METHOD, "Apply").

Only the columns of ``W_o`` that belong to locked heads contribute, so only those are read, one head at a
time. Products are summed in float32 (float64 for float64 weights) within a head and in float64 over heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from mlflow_safelock.errors import AlphaError, ApplyError
from mlflow_safelock.lock import AttentionGeometry, SafetyLock

_ROUNDINGS = 4.0
"""Accepted relative distance of a stored bias from the exact one, in unit roundoffs of its dtype: rounding
alone makes a half, and more where numbers are subnormal. Less than what verification of a model accepts."""

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


class Workspace:
    """Memory that the products of many heads share, because on a CPU fresh pages cost more than the sums.

    For one thread; not kept longer than it takes to lock a model.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[torch.dtype, torch.Size], torch.Tensor] = {}

    def gathered(self, columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The columns, contiguous and in a dtype, until the next call for the same shape."""
        # Gathered first, in the narrow dtype, then widened: half the time of widening while gathering.
        block = self._block(columns.dtype, columns.shape).copy_(columns)
        return block if block.dtype == dtype else self._block(dtype, columns.shape).copy_(block)

    def _block(self, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        key = dtype, shape
        if key not in self._blocks:
            self._blocks[key] = torch.empty(shape, dtype=dtype)
        return self._blocks[key]


def displacements(lock: SafetyLock, alpha: float) -> tuple[Displacement, ...]:
    """What ``lock`` at strength ``alpha`` adds, for every layer that holds a locked head, by layer.

    Raises:
        AlphaError: What it adds to a head is too small or too large for the float32 that models compute in.
    """
    heads = lock.heads
    stds = np.array([locked.std for locked in heads])
    pushes = alpha * stds[:, None] * np.array([locked.direction for locked in heads], dtype=np.float64)
    _refuse_beyond_float32(lock, pushes, alpha)
    values, found, start = torch.from_numpy(pushes), [], 0
    for layer, group in groupby(heads, key=attrgetter("layer")):
        indices = tuple(locked.head for locked in group)
        found.append(Displacement(layer, indices, values[start : start + len(indices)]))
        start += len(indices)
    return tuple(found)


def output_bias(
    head_weight: HeadWeight, displacement: Displacement, workspace: Workspace | None = None
) -> torch.Tensor:
    """The bias that a displacement is at the output of the projection, ``bias_l = W_o v_l``.

    Args:
        head_weight: Gives the columns of ``W_o`` for a head; asked for the locked heads only.
        displacement: The layer's displacement.
        workspace: Memory to share with other layers; its own where not given.

    Returns:
        Float64 of shape ``[hidden]``, on the weight's device (float32 where that device has no float64).
    """
    space = workspace or Workspace()
    terms = [
        _product(head_weight(head), values, space)
        for head, values in zip(displacement.heads, displacement.values, strict=True)
    ]
    return torch.stack(terms).sum(dim=0) if len(terms) > 1 else terms[0]


def base_biases(lock: SafetyLock, alpha: float) -> dict[int, torch.Tensor]:
    """The biases of a lock in its own base, from the lock alone.

    They are right for every model that has left the base's attention output projections as they were, such
    as the base under adapters that go elsewhere: ``bias_l = sum_h alpha * std_h * (W_o d_h)``.

    Args:
        lock: A lock with unit biases.
        alpha: Strength.

    Returns:
        Float64 ``[hidden]`` by layer, for every layer with a locked head, on the CPU.

    Raises:
        ApplyError: The lock has no unit biases.
    """
    if lock.unit_biases is None:
        raise ApplyError(
            f"The lock of {lock.base_model!r} holds no unit biases, so its biases need the weights.",
            next_step="Add them from the base's folder: safelock lock enroll.",
        )
    biases: dict[int, torch.Tensor] = {}
    for locked, unit in zip(lock.heads, lock.unit_biases, strict=True):
        term = alpha * locked.std * torch.from_numpy(unit.astype(np.float64))
        biases[locked.layer] = biases[locked.layer] + term if locked.layer in biases else term
    return biases


def stored_bias(
    push: torch.Tensor, own: torch.Tensor | None, dtype: torch.dtype, layer: int, alpha: float
) -> torch.Tensor:
    """Round a bias to the dtype that it is stored in.

    Args:
        push: What the lock adds, in float64.
        own: The bias that the model has of its own, if any.
        dtype: The dtype to store the sum in.
        layer: The layer that it is for, for the error.
        alpha: The strength that it was computed for, for the error.

    Raises:
        AlphaError: A number of it is beyond what the dtype can hold, or so little of the push is left that it
            is not the lock's any more, such as nothing but zeros, or less than the steps in which the model's
            own bias is stored.
    """
    total = push if own is None else push + own.to(push)
    stored = total.to(dtype)
    lost = torch.linalg.vector_norm(stored.to(total) - total)
    if lost <= accepted_loss(push, total, dtype) and bool(push.any()):
        return stored
    raise _lost(total, dtype, f"the bias of layer {layer}", alpha)


def accepted_loss(push: torch.Tensor, total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far a stored bias may be from the exact one for the lock to be in force.

    Args:
        push: What the lock adds, in float64.
        total: The exact bias: the push, and the bias that the model has of its own.
        dtype: The dtype that it is stored in.

    Returns:
        A length: a few roundings of the bias, but never more than half of the push.
    """
    rounding = _ROUNDINGS * torch.finfo(dtype).eps * torch.linalg.vector_norm(total)
    return torch.minimum(rounding, torch.linalg.vector_norm(push) / 2)


def check_kept(push: torch.Tensor, dtype: torch.dtype, layer: int, alpha: float) -> None:
    """Raise unless the input of a projection can be pushed in a dtype.

    Args:
        push: What is added to the input, in float64.
        dtype: The dtype of the input.
        layer: The layer that it is for, for the error.
        alpha: The strength that it was computed for, for the error.

    Raises:
        AlphaError: It is lost in the rounding to the dtype, or beyond what that can hold.
    """
    if torch.linalg.vector_norm(push.to(dtype).to(push) - push) <= accepted_loss(push, push, dtype):
        return
    raise _lost(push, dtype, f"the push on layer {layer}", alpha)


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


def _lost(total: torch.Tensor, dtype: torch.dtype, what: str, alpha: float) -> AlphaError:
    if not total.abs().max() <= torch.finfo(dtype).max:
        return AlphaError(
            f"At alpha {alpha} {what} is beyond what {dtype} can hold.",
            next_step="Use a smaller alpha, or weights of a wider dtype.",
        )
    return AlphaError(
        f"At alpha {alpha} {what} is lost in the rounding to {dtype}.",
        next_step="Use a larger alpha; the method's default is 6.0.",
    )


def head_columns(head: int, head_dim: int) -> slice:
    """Where a head's output lies in the input of the output projection."""
    return slice(head * head_dim, (head + 1) * head_dim)


def _refuse_beyond_float32(lock: SafetyLock, pushes: npt.NDArray[np.float64], alpha: float) -> None:
    sizes = np.abs(pushes).max(axis=1)
    limits = np.finfo(np.float32)
    outside = ~((sizes >= limits.tiny) & (sizes <= limits.max))
    if outside.any():
        at = lock.heads[int(outside.argmax())]
        head = f"head {at.head} of layer {at.layer}"
        raise AlphaError(
            f"At alpha {alpha} the push on {head} is beyond what float32 can hold.",
            next_step="The method's default is 6.0; to have no lock, remove it.",
        )


def _product(columns: torch.Tensor, values: torch.Tensor, workspace: Workspace) -> torch.Tensor:
    columns = columns.detach()
    accumulator = torch.float64 if columns.dtype == torch.float64 else torch.float32
    if columns.device.type == "cpu" and columns.stride(-1) == 1 and not columns.is_contiguous():
        # Also where the dtype stays: a product of rows that lie apart takes twice the time of both.
        columns = workspace.gathered(columns, accumulator)
    product = torch.mv(columns.to(accumulator), values.to(columns.device, accumulator))
    return product if product.device.type == "mps" else product.double()
