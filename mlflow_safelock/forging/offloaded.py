"""Weights that accelerate keeps outside of a model's modules, in main memory or on disk.

Such a weight is on ``meta``, which holds nothing, until a hook on its module brings it in to run. The hooks
are asked for what they have, so accelerate itself is not needed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def brought_in(module: nn.Module) -> Iterator[None]:
    """Have a module's own weights in place for a while, on the device on which it runs.

    A module whose weights are in place anyhow is left alone.
    """
    hooks = tuple(_offloading(module))
    try:
        for hook in hooks:
            hook.pre_forward(module)
        yield
    finally:
        for hook in hooks:
            hook.post_forward(module, None)


def offloaded_tensor(model: nn.Module, name: str) -> torch.Tensor | None:
    """The numbers of an entry of a model's state that is on ``meta``, as they are kept; ``None``: not found.

    Args:
        model: The model.
        name: The entry's name in ``model.state_dict()``.
    """
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        module = _submodule(model, ".".join(parts[:cut]))
        for hook in () if module is None else _offloading(module):
            found = _entry(hook.weights_map, ".".join(parts[cut:]))
            if found is not None:
                return found
    return None


def send_back(model: nn.Module) -> None:
    """Offload again what a forward pass that was cut off has left in the modules that it was in."""
    for module in model.modules():
        for hook in _offloading(module):
            held = module.parameters(recurse=hook.place_submodules)
            if any(parameter.device.type != "meta" for parameter in held):
                hook.post_forward(module, None)


def _offloading(module: nn.Module) -> Iterator[Any]:
    """The hooks of a module that bring its weights in when it runs, and send them back."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # several hooks of a module are one with a list
        if getattr(each, "offload", False):
            yield each


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:  # a name in the state need not be a path
        return None


def _entry(weights: Any, name: str) -> torch.Tensor | None:
    try:
        found = weights[name]
    except KeyError:
        return None
    return found if isinstance(found, torch.Tensor) and found.device.type != "meta" else None
