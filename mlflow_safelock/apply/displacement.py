"""The arithmetic of a lock: what it adds to the heads of a layer, and what that makes of the layer's output.

For a locked layer ``l`` the lock displaces the input of the attention output projection by
``v_l = concat_h(alpha * std_h * direction_h)``, zero for heads that are not locked. The projection is linear,
so that is a constant at its output: ``W_o (x + v_l) = W_o x + bias_l`` with ``bias_l = W_o v_l`` (arXiv
2410.10343, section 3; METHOD, "Apply").

Only the columns of ``W_o`` that belong to locked heads contribute, so only those are read: on a CPU one head
at a time, in memory that stays in its caches; elsewhere, such as on a GPU, where starting a computation takes
longer than the computation, those of all layers at once. Products are summed in float32 (float64 for float64
weights) within a head and in float64 over heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from mlflow_safelock.errors import AlphaError, ApplyError
from mlflow_safelock.lock import AttentionGeometry, SafetyLock

_ROUNDINGS = 4.0
"""Accepted relative distance of a stored bias from the exact one, in unit roundoffs of its dtype: rounding
alone makes a half, and more where numbers are subnormal. Less than what verification of a model accepts."""

_NUMBERS_AT_ONCE = 1 << 24
"""Numbers of columns that are multiplied at once on a GPU: 64 MiB of products in float32."""

_FLOAT32 = torch.finfo(torch.float32)

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

    def product(self, columns: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """The columns times one factor each, until the next call for the same shape."""
        if columns.stride(-1) == 1 and not columns.is_contiguous():
            # Also where the dtype stays: a product of rows that lie apart takes twice the time of both.
            return self.gathered(columns, factors.dtype).mul_(factors)
        # Laid out as they are: rows that are columns of a transposed weight would lie apart in the product.
        is_transposed = not columns.is_contiguous()
        shape = columns.T.shape if is_transposed else columns.shape
        block = self._block(factors.dtype, shape)
        return torch.mul(columns, factors, out=block.T if is_transposed else block)

    def _block(self, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        key = dtype, shape
        if key not in self._blocks:
            self._blocks[key] = torch.empty(shape, dtype=dtype, device="cpu")
        return self._blocks[key]


def displacements(lock: SafetyLock, alpha: float) -> tuple[Displacement, ...]:
    """What ``lock`` at strength ``alpha`` adds, for every layer that holds a locked head, by layer.

    Raises:
        AlphaError: What it adds to a head is too small or too large for the float32 that models compute in.
    """
    stds = np.array([locked.std for locked in lock.heads])
    pushes = alpha * stds[:, None] * np.array([locked.direction for locked in lock.heads], dtype=np.float64)
    _refuse_beyond_float32(lock, pushes, alpha)
    heads: dict[int, list[int]] = {}
    for locked in lock.heads:  # by layer, then head
        heads.setdefault(locked.layer, []).append(locked.head)
    values = torch.split(torch.from_numpy(pushes), [len(indices) for indices in heads.values()])
    return tuple(
        Displacement(layer, tuple(indices), pushed)
        for (layer, indices), pushed in zip(heads.items(), values, strict=True)
    )


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
    return output_biases([(head_weight, displacement)], workspace)[0]


def output_biases(
    parts: Sequence[tuple[HeadWeight, Displacement]], workspace: Workspace | None = None
) -> torch.Tensor:
    """The biases that displacements are at the outputs of the projections of several layers.

    Args:
        parts: For each layer what ``output_bias`` takes; the weights of all are of one dtype, on one device.
        workspace: As there.

    Returns:
        Float64 of shape ``[len(parts), hidden]``, as there.
    """
    # Each in its turn: where they are read from a file, the next ones may take the place of the last.
    columns = (head_weight(head) for head_weight, pushed in parts for head in pushed.heads)
    first = next(columns)
    values = torch.cat([pushed.values for _, pushed in parts]).to(first.device, _accumulator(first.dtype))
    counts = [len(pushed.heads) for _, pushed in parts]
    if first.device.type == "cpu":
        return _one_by_one(chain([first], columns), values, counts, workspace or Workspace())
    return _at_once([first, *columns], values, counts)


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
    rounded = StoredBiases(push[None], [own], dtype)
    rounded.check([layer], alpha)
    return rounded.stored[0]


class StoredBiases:
    """The biases of several layers, rounded to the dtype that they are stored in.

    Whether that was possible is looked at by ``check``, which has to be called: on a GPU it waits, so there
    is time for other work before.

    Args:
        pushes: What the lock adds, in float64, ``[layers, hidden]``.
        owns: For each layer the bias that the model has of its own, if any.
        dtype: The dtype to store the sums in.

    Attributes:
        stored: The biases, ``[layers, hidden]``, in the dtype.
    """

    def __init__(self, pushes: torch.Tensor, owns: Sequence[torch.Tensor | None], dtype: torch.dtype) -> None:
        totals = pushes
        if any(own is not None for own in owns):
            nothing = torch.zeros_like(pushes[0])
            totals = pushes + torch.stack([nothing if own is None else own.to(nothing) for own in owns])
        self.stored = totals.to(dtype)
        self._totals = totals
        compared = torch.stack([self.stored.to(totals) - totals, totals, pushes])
        self._lengths = torch.linalg.vector_norm(compared, dim=-1)

    def check(self, layers: Sequence[int], alpha: float) -> None:
        """Raise unless each bias is still that of the lock.

        Args:
            layers: For each the layer that it is for, for the error.
            alpha: The strength that they were computed for, for the error.

        Raises:
            AlphaError: As of ``stored_bias``, for the first layer of which it is true.
        """
        dtype = self.stored.dtype
        # One answer is waited for, whatever the number of layers: on a GPU, waiting is what takes time.
        for place, (lost, total, push) in enumerate(zip(*self._lengths.tolist(), strict=True)):
            if not (push > 0.0 and lost <= accepted_loss(push, total, dtype)):
                raise _lost(self._totals[place], dtype, f"the bias of layer {layers[place]}", alpha)


def accepted_loss(push: float, total: float, dtype: torch.dtype) -> float:
    """How far a stored bias may be from the exact one for the lock to be in force.

    Args:
        push: Length of what the lock adds.
        total: Length of the exact bias: of the push, and of the bias that the model has of its own.
        dtype: The dtype that it is stored in.

    Returns:
        A length: a few roundings of the bias, but never more than half of the push.
    """
    return min(_ROUNDINGS * torch.finfo(dtype).eps * total, push / 2)


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
    length = float(torch.linalg.vector_norm(push))
    if torch.linalg.vector_norm(push.to(dtype).to(push) - push) <= accepted_loss(length, length, dtype):
        return
    raise _lost(push, dtype, f"the push on layer {layer}", alpha)


def input_displacement(displacement: Displacement, geometry: AttentionGeometry) -> torch.Tensor:
    """The displacement with its zeros, ``v_l``: float64 of shape ``[heads * head_dim]``, on the CPU."""
    full = torch.zeros(geometry.heads, geometry.head_dim, dtype=torch.float64, device="cpu")
    full[list(displacement.heads)] = displacement.values
    return full.flatten()


def head_weight_of(weight: torch.Tensor, head_dim: int, layout: Literal["linear", "conv1d"]) -> HeadWeight:
    """Read the columns of heads out of a weight in memory.

    Args:
        weight: ``W_o``, of shape ``[hidden, heads * head_dim]``, or transposed for ``conv1d``.
        head_dim: Width of a head.
        layout: How the weight is laid out.
    """
    held = weight.detach() if weight.requires_grad and torch.is_grad_enabled() else weight
    if layout == "linear":
        return lambda head: held.narrow(1, head * head_dim, head_dim)
    return lambda head: held.narrow(0, head * head_dim, head_dim).T


def _lost(total: torch.Tensor, dtype: torch.dtype, what: str, alpha: float) -> AlphaError:
    if total.isnan().any():
        return AlphaError(
            f"At alpha {alpha} {what} is no number: the weights that it is made from hold some that are no "
            "numbers, or alpha is far too large.",
            next_step="The method's default is 6.0. If that is so, too, copy the fine-tune again.",
        )
    if not total.any():
        return AlphaError(
            f"At any alpha {what} is zero: so are the weights that it is made from.",
            next_step="Copy the fine-tune again: an attention output projection in it is empty.",
        )
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
    outside = ~((sizes >= _FLOAT32.tiny) & (sizes <= _FLOAT32.max))
    if outside.any():
        at = lock.heads[int(outside.argmax())]
        head = f"head {at.head} of layer {at.layer}"
        raise AlphaError(
            f"At alpha {alpha} the push on {head} is beyond what float32 can hold.",
            next_step="The method's default is 6.0; to have no lock, remove it.",
        )


def _one_by_one(
    columns: Iterable[torch.Tensor], values: torch.Tensor, counts: Sequence[int], workspace: Workspace
) -> torch.Tensor:
    """For a CPU: a head's columns fit its caches, those of all heads do not."""
    products = []
    for weight, displaced in zip(columns, values, strict=True):
        # Not by a product of matrices: MKL's of this size may wait for a second thread for as long again.
        products.append(workspace.product(weight, displaced).sum(dim=1))
    of_layers = torch.split(torch.stack(products), list(counts))
    return torch.stack([terms.sum(dim=0, dtype=torch.float64) for terms in of_layers])


def _at_once(columns: Sequence[torch.Tensor], values: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """For a GPU: a few long steps in place of many short ones, and no product that may round to TF32."""
    # As many places for every layer as the fullest needs, so that one sum serves all.
    most = max(counts)
    places = [layer * most + place for layer, count in enumerate(counts) for place in range(count)]
    # Sent before there is anything to compute: what is sent waits for what a GPU was given to do.
    indices = torch.tensor(places, device=values.device)
    widest = values.dtype if values.device.type == "mps" else torch.float64
    terms = values.new_zeros(len(counts) * most, columns[0].shape[0], dtype=widest)
    step = max(1, _NUMBERS_AT_ONCE // columns[0].numel())
    for start in range(0, len(columns), step):
        end = start + step
        products = torch.stack(list(columns[start:end])).mul(values[start:end, None]).sum(dim=-1)
        terms.index_copy_(0, indices[start:end], products.to(widest))
    return terms.view(len(counts), most, -1).sum(dim=1)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
