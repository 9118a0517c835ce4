"""What a lock adds to the layers of a loaded model, as it is in force there, whatever carries it."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

from mlflow_safelock.apply.architectures import attention_of
from mlflow_safelock.apply.carriers import BiasCarrier, carrier_on
from mlflow_safelock.apply.displacement import input_displacement
from mlflow_safelock.errors import VerificationError


@torch.no_grad()
def pushes_in_force(model: nn.Module) -> dict[int, torch.Tensor]:
    """What the lock on a loaded model adds to the output of each locked layer's projection.

    Of a bias it is the bias in place without the model's own. A projection with a hook, which may be
    quantised or have adapters on it, is asked: it is called once, with the displacement and without.

    Args:
        model: A locked model of ``transformers``, or a PEFT model around one.

    Returns:
        ``[hidden]`` by layer, in the model's dtype or wider, on the CPU.

    Raises:
        VerificationError: A projection cannot be called, or the bias of one is gone or offloaded.
    """
    pushes, attention = {}, attention_of(model)
    for layer, projection in enumerate(attention.projections):
        carrier = carrier_on(projection)
        if isinstance(carrier, BiasCarrier):
            pushes[layer] = _added(carrier)
        elif carrier is not None:
            push = input_displacement(carrier.displacement, attention.geometry)
            pushes[layer] = _asked(projection, push, layer, model)
    return pushes


def _added(carrier: BiasCarrier) -> torch.Tensor:
    bias, own = carrier.in_place(), carrier.own_bias
    if bias is None:
        layer = carrier.displacement.layer
        raise VerificationError(
            f"Layer {layer}: the bias that carries the lock is gone.", next_step="Load the model again."
        )
    whole = bias.detach().cpu().double()
    return whole if own is None else whole - own.cpu().double()


def _asked(projection: nn.Module, displacement: torch.Tensor, layer: int, model: nn.Module) -> torch.Tensor:
    """The difference that a hook makes to the output of a projection of whatever kind."""
    # The hook adds to what comes in: of nothing it makes the push, and of its opposite nothing.
    return made_of(projection, displacement, layer, model, hooked=True)


@torch.no_grad()
def made_of(
    projection: nn.Module, constant: torch.Tensor, layer: int, model: nn.Module, *, hooked: bool = False
) -> torch.Tensor:
    """What a projection of whatever kind makes of a constant in its input, by asking it with and without.

    Args:
        projection: The projection.
        constant: ``[heads * head_dim]``.
        layer: Its layer, for the error.
        model: The model that it is in.
        hooked: Whether a hook on it adds the constant.

    Returns:
        ``[hidden]``, in the model's dtype or wider, on the CPU.

    Raises:
        VerificationError: It cannot be called.
    """
    added = constant.to(numbers_like(projection, model))
    # A kernel that scales blocks of its input by the largest number in them may make of a block of zeros
    # what is no number: then it is asked with others.
    size = float(torch.linalg.vector_norm(constant)) / math.sqrt(len(constant))
    for beside in (torch.zeros_like(added), torch.full_like(added, size)):
        asked = (beside, beside - added) if hooked else (beside + added, beside)
        with_it, alone = _outputs(projection, torch.stack(asked), layer)
        made: torch.Tensor = (with_it - alone).flatten().cpu()
        if made.isfinite().all():
            break
    return made


@torch.no_grad()
def constant_of(projection: nn.Module, width: int, layer: int, model: nn.Module) -> torch.Tensor:
    """What a projection of whatever kind gives of nothing: its bias, as adapters on it make it.

    Args:
        projection: The projection.
        width: How many numbers it takes.
        layer: Its layer, for the error.
        model: The model that it is in.

    Returns:
        ``[outputs]``, in the model's dtype or wider, on the CPU.

    Raises:
        VerificationError: It cannot be called.
    """
    nothing = torch.zeros(width).to(numbers_like(projection, model))
    given: torch.Tensor = _outputs(projection, nothing[None], layer)[0]
    if not given.isfinite().all():
        # As above.
        once, twice = _outputs(projection, torch.stack([nothing + 1, nothing + 2]), layer)
        given = 2 * once - twice
    return given.flatten().cpu()


def _outputs(projection: nn.Module, inputs: torch.Tensor, layer: int) -> torch.Tensor:
    """What a projection makes of each of some inputs, ``[inputs, width]``."""
    try:
        return cast("torch.Tensor", projection(inputs[:, None]))
    except Exception as error:  # each kind of projection has its own ways to fail
        raise VerificationError(
            f"Layer {layer}: a projection cannot be called, so that it cannot be told what the lock adds: "
            f"{error}.",
            next_step="Load the model where it can run.",
        ) from error


def numbers_like(projection: nn.Module, model: nn.Module) -> torch.Tensor:
    """Numbers of the dtype, and on the device, that a projection takes."""
    for module in (projection, model):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                return tensor if tensor.device.type != "meta" else torch.zeros(0, dtype=tensor.dtype)
    return torch.zeros(0)
