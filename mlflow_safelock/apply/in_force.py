"""What a lock adds to the layers of a loaded model, as it is in force there, whatever carries it."""

from __future__ import annotations

import math

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
        VerificationError: A projection cannot be called, or what it does depends on the prompt (aLoRA).
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "alora_invocation_tokens", None):
            raise VerificationError(
                f"The adapter {name!r} is switched on by tokens in a prompt, so that nothing can be told of "
                "what it leaves of a lock.",
                next_step="Use a LoRA adapter that is always on, or merge it.",
            )
    pushes, attention = {}, attention_of(model)
    for layer, projection in enumerate(attention.projections):
        carrier = carrier_on(projection)
        if isinstance(carrier, BiasCarrier):
            pushes[layer] = _added(projection, carrier)
        elif carrier is not None:
            push = input_displacement(carrier.displacement, attention.geometry)
            pushes[layer] = _asked(projection, push, layer, model)
    return pushes


def _added(projection: nn.Module, carrier: BiasCarrier) -> torch.Tensor:
    bias, own = projection.bias, carrier.own_bias
    assert isinstance(bias, torch.Tensor)
    whole = bias.cpu().double()
    return whole if own is None else whole - own.cpu().double()


def _asked(projection: nn.Module, displacement: torch.Tensor, layer: int, model: nn.Module) -> torch.Tensor:
    """The difference that a hook makes to the output of a projection of whatever kind."""
    like = numbers_like(projection, model)
    push = displacement.to(like)
    # The hook adds to what comes in: of nothing it makes the push, and of its opposite nothing. A kernel that
    # scales blocks of its input by the largest number in them may make of a block of zeros what is none.
    size = float(torch.linalg.vector_norm(displacement)) / math.sqrt(len(displacement))
    try:
        for beside in (torch.zeros_like(push), torch.full_like(push, size)):
            with_it, alone = projection(torch.stack([beside, beside - push])[:, None])
            pushed: torch.Tensor = (with_it - alone).flatten().cpu()
            if pushed.isfinite().all():
                break
        return pushed
    except Exception as error:  # each kind of projection has its own ways to fail
        raise VerificationError(
            f"Layer {layer}: the output projection cannot be called, so that nothing can be told of what the "
            f"lock adds there: {error}.",
            next_step="Load the model where it can run.",
        ) from error


def numbers_like(projection: nn.Module, model: nn.Module) -> torch.Tensor:
    """Numbers of the dtype, and on the device, that a projection takes."""
    for module in (projection, model):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                return tensor if tensor.device.type != "meta" else torch.zeros(0, dtype=tensor.dtype)
    return torch.zeros(0)
