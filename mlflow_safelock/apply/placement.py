"""Where a loaded model takes its inputs, also where accelerate keeps its weights elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from mlflow_safelock.errors import ApplyError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def execution_device(model: PreTrainedModel) -> torch.device:
    """The device on which a model's input embeddings are computed: token ids go there.

    Args:
        model: A ``transformers`` model, or a PEFT model around one; whole, spread over devices, or offloaded.

    Returns:
        The device of the embedding weights. Offloaded weights are on the meta device between two uses; then
        it is the device that accelerate brings them to.

    Raises:
        ApplyError: The weights are on the meta device, and nothing says where they are computed.
    """
    embeddings: Any = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    if device.type != "meta":
        return device
    found = next((place for module in (embeddings, *model.modules()) for place in _hooked_to(module)), None)
    if found is None:
        raise ApplyError(
            "The model's input embeddings are on the meta device, so they hold no numbers.",
            next_step="Load the model with its weights.",
        )
    return torch.device(found)


def _hooked_to(module: nn.Module) -> Iterator[Any]:
    """The devices that accelerate's hooks of a module move its weights and inputs to."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # several hooks of a module are one with a list
        place = getattr(each, "execution_device", None)
        if place is not None:
            yield place
