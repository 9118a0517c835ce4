"""Whether the biases of a loaded model, before it is locked, take a lock's push back or are a lock's.

What is stored is looked at before a promotion. Of an adapter the base is not stored, and which of the stored
biases a model has is told by the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mlflow_safelock.apply.architectures import Attention, attention_of, part_at
from mlflow_safelock.apply.displacement import base_biases
from mlflow_safelock.apply.in_force import constant_of, made_of
from mlflow_safelock.apply.own_biases import biased_paths, fault_of, head_outputs
from mlflow_safelock.errors import VerificationError
from mlflow_safelock.forging.offloaded import brought_in
from mlflow_safelock.lock import SafetyLock


class OwnBiases:
    """The biases of a loaded model, read before it is locked.

    Args:
        model: A model of ``transformers``, or a PEFT model around one.
        layers: The layers that will be locked.

    Raises:
        UnsupportedArchitectureError: Its attention heads are not known.
    """

    def __init__(self, model: nn.Module, layers: Collection[int]) -> None:
        self._attention = attention_of(model)
        self._biases = _biases_of(self._attention, model)
        outputs = head_outputs(self._biases, self._attention.architecture, self._attention.geometry)
        self._through = {
            layer: _through(self._attention.projections[layer], values, layer, model)
            for layer, values in outputs.items()
            if layer in layers and values.any()
        }

    def check(self, lock: SafetyLock, alpha: float, arriving: Mapping[int, float], name: str) -> None:
        """Raise where they take half of a lock's push back in a layer, or are half of a lock's.

        Args:
            lock: A lock with unit biases, of this model's shape.
            alpha: Its strength.
            arriving: The share of each layer's push that arrives.
            name: The model's name, for the error.

        Raises:
            VerificationError: They do, or are.
        """
        through = {}
        for layer, push in base_biases(lock, alpha).items():
            if layer in self._through and push.any():
                through[layer] = float(self._through[layer] @ push.numpy()) / float(push @ push)
        fault = fault_of(self._biases, through, arriving, self._attention.architecture, lock, alpha)
        if fault is not None:
            raise VerificationError(
                f"{name[:1].upper()}{name[1:]} has biases of its own that {fault.what}.",
                next_step="Use a fine-tune, and a base, without them. If the base has such biases itself, "
                "promote it through a gate with 'own_biases: ignore', or save it with own_biases='ignore'.",
            )


def _biases_of(attention: Attention, model: nn.Module) -> dict[int, dict[str, npt.NDArray[np.float64]]]:
    found: dict[int, dict[str, npt.NDArray[np.float64]]] = {}
    for index, layer in enumerate(attention.layers):
        for path in biased_paths(attention.architecture):
            bias = _bias_at(layer, path, index, model)
            if bias is not None:
                found.setdefault(index, {})[path] = bias
    return found


def _bias_at(layer: nn.Module, path: str, index: int, model: nn.Module) -> npt.NDArray[np.float64] | None:
    """The bias of a module of a layer, or that of experts, which is one parameter beside their weights."""
    parent, _, last = path.rpartition(".")
    for owner, name in ((part_at(layer, path), "bias"), (part_at(layer, parent), f"{last}_bias")):
        if isinstance(owner, nn.Module):
            within = _without_adapters(owner)
            with brought_in(owner):
                bias = getattr(within, name, None)
                if isinstance(bias, torch.Tensor):
                    if within is not owner and name == "bias":
                        # An adapter may scale it with all else that comes out, as IA3 does.
                        bias = constant_of(owner, _width(within), index, model)
                    return np.asarray(bias.detach().to("cpu", torch.float64).numpy())
    return None


def _without_adapters(module: nn.Module) -> nn.Module:
    """What adapters were put around; they change the weights of experts, and never their biases."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _width(projection: Any) -> int:
    """How many numbers a projection takes; GPT-2's classes say it by their weight, which packed ones lack."""
    width, weight = getattr(projection, "in_features", None), getattr(projection, "weight", None)
    if width is not None:
        return int(width)
    if not isinstance(weight, torch.Tensor):
        raise VerificationError(
            f"It cannot be told how wide the input of a {type(projection).__name__} below an adapter is, so "
            "its bias cannot be compared with the lock's.",
            next_step="Merge the adapter before logging: model.merge_and_unload().",
        )
    return int(weight.shape[0])


def _through(
    projection: nn.Module, values: npt.NDArray[np.float64], layer: int, model: nn.Module
) -> npt.NDArray[np.float64]:
    """What constant outputs of the heads make at the output of a projection of any kind, ``[hidden]``."""
    with brought_in(projection):
        return np.asarray(
            made_of(projection, torch.from_numpy(values.flatten()), layer, model).double().numpy()
        )
