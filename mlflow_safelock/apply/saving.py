"""``save_pretrained`` of a locked model: a folder that stock ``transformers`` reloads locked, or a refusal.

``transformers`` drops an output bias on loading unless the configuration says that there is one, so what its
own ``save_pretrained`` writes of a locked model would often reload unlocked. While a model carries a lock,
``LockedSaving`` stands in for that method. Nothing of the model changes when it is saved.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from mlflow_safelock.apply.architectures import Architecture, Attention, attention_of
from mlflow_safelock.apply.carriers import BiasCarrier, Carrier, bias_carriers, carrier_on, is_plain_matrix
from mlflow_safelock.apply.config_entry import CONFIG_KEY, config_entry
from mlflow_safelock.errors import CheckpointError, UnsupportedArchitectureError, VerificationError

_UNLOCKED = "Save the model without the lock, after handle.remove(), and "
_FOLDER = "lock the folder (save_locked_checkpoint, or safelock export), or "
_OVERLAY = "promote it with the overlay carrier."


class LockedSaving:
    """Stands in for ``save_pretrained`` of a model, or of a part of one, while it carries a lock.

    Args:
        model: The model whose method it stands in for.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        *arguments: Any,
        **settings: Any,
    ) -> Any:
        """Save the model, locked. The arguments are those of ``transformers``.

        Raises:
            AlphaError: A bias is too large for the model's dtype.
            CheckpointError: The model as it is cannot be saved locked: it is quantised, say, or has adapters
                that are not merged.
            UnsupportedArchitectureError: No checkpoint of this architecture can carry the lock.
            VerificationError: The lock in place is not what locking put there.
        """
        saved, tensors = self.locked(state_dict)
        save = type(saved).save_pretrained
        return save(saved, save_directory, is_main_process, tensors, *arguments, **settings)

    def locked(self, state_dict: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any] | None]:
        """What is saved in the model's place.

        Args:
            state_dict: The model's tensors; its own where not given.

        Returns:
            A model that shares all with this one but its configuration, and its tensors with those that the
            configuration asks for.

        Raises:
            AlphaError, CheckpointError, UnsupportedArchitectureError, VerificationError: As above.
        """
        model = self._model
        if all(carrier_on(module) is None for module in model.modules()):
            return model, None if state_dict is None else dict(state_dict)
        if hasattr(type(model), "get_base_model"):
            raise CheckpointError(
                "An adapter alone cannot carry the lock of the model that it is on, and was not saved.",
                next_step="Merge it first, model.merge_and_unload(), or take the lock off: handle.remove().",
            )
        attention = attention_of(model)
        carriers = _carriers_of(attention)
        _refuse_without_place(model.config, attention.architecture)
        saved = copy.copy(model)
        applied = next(iter(carriers.values())).applied
        saved.config = _locked_config(model.config, attention.architecture)
        # Not that of the model's own configuration: a part has another, and models that share one share it.
        setattr(saved.config, CONFIG_KEY, config_entry(applied.lock, applied.alpha))
        tensors = {**(state_dict or model.state_dict()), **dict(_biases(model, attention, carriers))}
        _refuse_what_loads_otherwise(saved, tensors)
        return saved, tensors


class LockedPushing:
    """Stands in for ``push_to_hub``, which makes a repository before it saves: refuses before that."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        """Push the model, locked. The arguments are those of ``transformers``; errors as of saving."""
        LockedSaving(self._model).locked()
        return type(self._model).push_to_hub(self._model, *arguments, **settings)


_STAND_INS = {"save_pretrained": LockedSaving, "push_to_hub": LockedPushing}


def save_locked(model: nn.Module, layers: Iterable[nn.Module] = ()) -> None:
    """Have a locked model and its parts saved with their lock, or refused.

    Args:
        model: The model.
        layers: Its decoder layers, in which there is no part that could be saved by itself.
    """
    modules = _modules_of(model, layers)
    for name, stand_in in _STAND_INS.items():
        having = {kind for kind in set(map(type, modules)) if hasattr(kind, name)}
        for module in modules:
            if type(module) in having:
                setattr(module, name, stand_in(module))


def save_as_before(model: nn.Module) -> None:
    """Have a model and its parts saved by their own methods again."""
    for module in _modules_of(model):
        for name, stand_in in _STAND_INS.items():
            if isinstance(module.__dict__.get(name), stand_in):
                delattr(module, name)


def _modules_of(model: nn.Module, beside: Iterable[nn.Module] = ()) -> Collection[nn.Module]:
    """What ``model.modules()`` gives, but quickly, and nothing of some: a lock is put on in milliseconds."""
    found, seen, level = [model], {model, *beside}, [model]
    while level:
        children = [child for module in level for child in module._modules.values() if child is not None]
        level = [child for child in dict.fromkeys(children) if child not in seen]
        seen.update(level)
        found += level
    return found


def _carriers_of(attention: Attention) -> dict[int, Carrier]:
    """The carriers of a lock by layer, once they are known to be all that it has, and as they were."""
    found = {layer: carrier_on(projection) for layer, projection in enumerate(attention.projections)}
    carriers = {layer: carrier for layer, carrier in found.items() if carrier is not None}
    for carrier in carriers.values():
        carrier.check_untouched()
        carrier.verify()  # what was trained or merged under the lock has other weights than it was made from
        missing = sorted(set(carrier.applied.lock.layers) - set(carriers))
        if missing:
            raise VerificationError(
                f"Layer {missing[0]}: its output projection was replaced after it was locked.",
                next_step="Remove the lock and apply it to the model as it is now.",
            )
    return carriers


def _refuse_without_place(config: Any, architecture: Architecture) -> None:
    kind = config.model_type
    if kind == architecture.model_type and (
        _has_output_bias(config, architecture) or architecture.standalone == "flag"
    ):
        return
    raise UnsupportedArchitectureError(
        f"save_pretrained writes no {kind!r} checkpoint that transformers would reload locked: it drops the "
        "biases of the lock on loading. Nothing was saved.",
        next_step=f"{_UNLOCKED}{_FOLDER if architecture.standalone == 'rewritten' else ''}{_OVERLAY}",
    )


def _has_output_bias(config: Any, architecture: Architecture) -> bool:
    decided_by = architecture.output_bias
    return decided_by == "always" or bool(getattr(config, decided_by, False))


def _locked_config(config: Any, architecture: Architecture) -> Any:
    """The configuration with which ``transformers`` loads the biases."""
    locked = copy.deepcopy(config)
    if not _has_output_bias(config, architecture):
        setattr(locked, architecture.output_bias, True)
    return locked


def _biases(
    model: Any, attention: Attention, carriers: Mapping[int, Carrier]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The biases of the lock, and zeros for the others that the flag of the configuration asks for."""
    architecture = attention.architecture
    names = {module: name for name, module in model.named_modules()}
    there = set(names.values())
    for layer, projection in enumerate(attention.projections):
        name = names[projection]
        if not _has_output_bias(model.config, architecture):
            start = name.removesuffix(architecture.output_projection)
            optional = (start + other for other in architecture.biased_where_present)
            beside = (start + other for other in architecture.biased_with_output)
            for path in (name, *beside, *(path for path in optional if path in there)):
                yield f"{path}.bias", _zeros(model.get_submodule(path))
        if layer in carriers:
            yield f"{name}.bias", _locked_bias(projection, carriers[layer], attention)


def _zeros(projection: Any) -> torch.Tensor:
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise _not_plain("a projection has no weight of its own")
    return torch.zeros(weight.shape[0], dtype=weight.dtype)


def _locked_bias(projection: nn.Module, carrier: Carrier, attention: Attention) -> torch.Tensor:
    """A locked layer's bias; computed where a hook carries the lock."""
    layer, geometry = carrier.displacement.layer, attention.geometry
    if not is_plain_matrix(projection, geometry) or projection not in carrier.modules:
        raise _not_plain(f"the output projection of layer {layer} is quantised, wrapped or offloaded")
    if isinstance(carrier, BiasCarrier):
        in_place = projection.bias
        assert isinstance(in_place, torch.Tensor)
        return in_place.detach()
    (computed,) = bias_carriers(carrier.applied, [carrier.displacement], attention)
    return computed.bias


def _refuse_what_loads_otherwise(saved: Any, tensors: Mapping[str, Any]) -> None:
    """Refuse unless the model that ``transformers`` builds of the configuration has exactly these tensors."""
    if getattr(saved, "hf_quantizer", None) is not None:
        raise _not_plain("it is quantised")
    try:
        with torch.device("meta"), no_init_weights():
            built = type(saved)(copy.deepcopy(saved.config))
    except Exception as error:  # each model class has its own ways to reject a configuration
        raise _not_plain(f"transformers cannot build it of its configuration ({error})") from error
    expected = {name: tensor.shape for name, tensor in built.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    different = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if different:
        raise _not_plain(f"it has another {different[0]} than transformers builds of its configuration")


def _not_plain(what: str) -> CheckpointError:
    return CheckpointError(
        f"This locked model cannot be saved so that it reloads locked: {what}. Nothing was saved.",
        next_step=f"Merge adapters first, model.merge_and_unload(). {_UNLOCKED}{_FOLDER}{_OVERLAY}",
    )
