"""Where the attention heads of a model are.

A head's output is a slice of the *input* of the attention output projection: head ``h`` of a layer is
``h * head_dim : (h + 1) * head_dim`` (METHOD, forge step 3). So all there is to know about an architecture is
where its decoder layers are, which module inside a layer is the output projection, how that module lays out
its weight, and whether a checkpoint of this architecture can hold a bias for it. ``table`` says that.

This module imports neither torch nor transformers, so that a registry server can ask it about configurations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from pydantic import ValidationError

from mlflow_safelock.apply.described import HOW_TO_DESCRIBE, described_architectures
from mlflow_safelock.apply.description import Architecture
from mlflow_safelock.apply.table import ARCHITECTURES
from mlflow_safelock.errors import UnsupportedArchitectureError
from mlflow_safelock.lock import AttentionGeometry

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Attention",
    "architecture_of",
    "attention_of",
    "geometry_from_config",
]


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of a loaded model.

    Attributes:
        architecture: Its row in the table, its description, or what was found out about it.
        geometry: Its shape.
        layers: Its decoder layers, in order.
        projections: The attention output projection of every layer, in order. A head's output is a slice of
            the projection's input, which is ``[..., heads * head_dim]``.
    """

    architecture: Architecture
    geometry: AttentionGeometry
    layers: tuple[nn.Module, ...]
    projections: tuple[nn.Module, ...]


def attention_of(model: PreTrainedModel) -> Attention:
    """Find the attention output projections of a model.

    Where neither the table nor a description knows the architecture, they are looked for in the model, and
    verified on a few random tokens; a described one is verified, too. Once for each model object.

    Args:
        model: A ``transformers`` model that decodes text, bare or with a head, or a PEFT model around one.

    Raises:
        UnsupportedArchitectureError: The architecture is not known and its heads were not found, or this
            model is not built as is said of its architecture.
    """
    if not hasattr(model, "config"):
        raise UnsupportedArchitectureError(
            f"The model is of type {type(model).__name__!r}, and not a model of transformers.",
            next_step="Load it: AutoModelForCausalLM.from_pretrained(...).",
        )
    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    values = _text_config(unwrapped.config)
    architecture = _known(values) or _seen.get(unwrapped)
    if architecture is None:
        from mlflow_safelock.apply.discovery import discovered

        architecture = _seen[unwrapped] = discovered(unwrapped, values)
    geometry = _geometry(values, architecture)
    layers = tuple(_decoder_layers(unwrapped, architecture, geometry))
    projections = tuple(part_at(layer, architecture.output_projection) for layer in layers)
    for index, projection in enumerate(projections):
        _check_projection(projection, index, architecture, geometry)
    _refuse_shared(projections, architecture)
    if architecture.model_type not in ARCHITECTURES and _seen.get(unwrapped) != architecture:
        from mlflow_safelock.apply.probing import check_displacing

        name = f"{architecture.output_projection!r}, as {architecture.model_type!r} is described,"
        check_displacing(unwrapped, projections, geometry, name)
        _seen[unwrapped] = architecture
    return Attention(architecture, geometry, layers, projections)


_seen: WeakKeyDictionary[PreTrainedModel, Architecture] = WeakKeyDictionary()
"""Models whose heads were found or verified, so that it is done once."""


def architecture_of(config: PretrainedConfig | Mapping[str, Any]) -> Architecture:
    """What the table, or a description, says of a configuration's architecture.

    Args:
        config: A ``transformers`` configuration, or the contents of a ``config.json``. Where the text model's
            configuration is nested in it, the nested one counts.

    Raises:
        UnsupportedArchitectureError: Neither knows the architecture.
    """
    return _row(_text_config(config))


def geometry_from_config(config: PretrainedConfig | Mapping[str, Any]) -> AttentionGeometry:
    """The attention shape that a configuration describes.

    Args:
        config: A ``transformers`` configuration, or the contents of a ``config.json``. Where the text model's
            configuration is nested in it, the nested one counts.

    Returns:
        Query heads, and ``head_dim`` as configured, or ``hidden / heads`` where it is not configured.

    Raises:
        UnsupportedArchitectureError: The architecture is neither in the table nor described, or the
            configuration does not describe the shape of its attention.
    """
    values = _text_config(config)
    return _geometry(values, _row(values))


def _geometry(values: Mapping[str, Any], architecture: Architecture) -> AttentionGeometry:
    _refuse_bypassed(values, architecture)
    layers, heads, hidden, head_dim = (values.get(name) for name in architecture.config_names)
    head_dim = head_dim or architecture.default_head_dim
    try:
        if head_dim is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            head_dim, rest = divmod(hidden, heads)
            if rest:
                raise ValueError(f"hidden size {hidden} is not a multiple of {heads} heads")
        shape = {"layers": layers, "heads": heads, "head_dim": head_dim, "hidden": hidden}
        return AttentionGeometry.model_validate(shape)
    except (ValidationError, ValueError) as error:
        described = ", ".join(f"{name}={values.get(name)!r}" for name in architecture.config_names)
        raise UnsupportedArchitectureError(
            f"The configuration of this {architecture.model_type!r} model does not describe its attention: "
            f"{described}.",
            next_step="Use the config.json that transformers' save_pretrained writes.",
        ) from error


def _refuse_bypassed(values: Mapping[str, Any], architecture: Architecture) -> None:
    if architecture.bypassed_by is not None and values.get(architecture.bypassed_by):
        raise UnsupportedArchitectureError(
            f"With {architecture.bypassed_by} this {architecture.model_type!r} model uses the weight of its "
            "output projections without calling them: a lock would have no effect.",
            next_step=f"Set {architecture.bypassed_by} to false in its configuration.",
        )


def _known(values: Mapping[str, Any]) -> Architecture | None:
    model_type, described = values.get("model_type"), described_architectures()
    if not isinstance(model_type, str):
        return None
    return ARCHITECTURES.get(model_type) or described.get(model_type)


def _row(values: Mapping[str, Any]) -> Architecture:
    architecture = _known(values)
    if architecture is None:
        model_type = values.get("model_type")
        known = {*ARCHITECTURES, *described_architectures()}
        raise UnsupportedArchitectureError(
            f"The attention heads of model type {model_type!r} are not known. "
            f"Known types: {', '.join(sorted(known))}.",
            next_step=HOW_TO_DESCRIBE.format(model_type=model_type),
        )
    return architecture


def _text_config(config: PretrainedConfig | Mapping[str, Any]) -> Mapping[str, Any]:
    values = _values(config)
    nested = values.get("text_config")
    return _values(nested) if isinstance(nested, Mapping) or hasattr(nested, "model_type") else values


def _values(config: Any) -> Mapping[str, Any]:
    """What a configuration says by name; without the deep copy that ``to_dict`` makes."""
    if isinstance(config, Mapping):
        return config
    return {**vars(config), "model_type": config.model_type}


def _decoder_layers(
    model: PreTrainedModel, architecture: Architecture, geometry: AttentionGeometry
) -> Iterable[nn.Module]:
    # Only models of transformers have a method for it; others may have the layers where the path says.
    decoder = getattr(model, "get_decoder", lambda: model)()
    for root in (model, decoder):
        # A bare model lacks the path's first names, which a model with a language modelling head has.
        for path in _suffixes(architecture.layers):
            layers = part_at(root, path)
            if hasattr(layers, "__len__") and len(layers) == geometry.layers:
                found: Iterable[nn.Module] = layers
                return found
    raise UnsupportedArchitectureError(
        f"{type(model).__name__} has no list of {geometry.layers} decoder layers at {architecture.layers!r}, "
        f"where models of type {architecture.model_type!r} have it.",
        next_step="Load the model with transformers' own class for it.",
    )


def _check_projection(
    projection: Any, index: int, architecture: Architecture, geometry: AttentionGeometry
) -> None:
    where = f"layer {index} of this {architecture.model_type!r} model"
    if projection is None:
        raise UnsupportedArchitectureError(
            f"There is no attention output projection at {architecture.output_projection!r} in {where}.",
            next_step="Load the model with transformers' own class for it.",
        )
    # A Linear calls its width in_features, a Conv1D nx; other modules may call it nothing.
    width = getattr(projection, "in_features", None) or getattr(projection, "nx", None)
    if width is not None and width != geometry.heads * geometry.head_dim:
        raise UnsupportedArchitectureError(
            f"The attention output projection of {where} takes {width} numbers, and its configuration says "
            f"{geometry.heads} heads x {geometry.head_dim}.",
            next_step="A lock names heads by number: a model with pruned or uneven heads cannot be locked.",
        )


def _refuse_shared(projections: Sequence[nn.Module], architecture: Architecture) -> None:
    first: dict[nn.Module, int] = {}
    for layer, projection in enumerate(projections):
        if projection in first:
            raise UnsupportedArchitectureError(
                f"Layers {first[projection]} and {layer} of this {architecture.model_type!r} model share one "
                "attention output projection, and a lock pushes each layer by its own bias.",
                next_step="Give each layer its own: copy.deepcopy of the shared one.",
            )
        first[projection] = layer


def _suffixes(path: str) -> Iterator[str]:
    names = path.split(".")
    return (".".join(names[start:]) for start in range(len(names)))


def part_at(root: Any, path: str) -> Any:
    """What is at a dotted path below a module; itself at none, ``None`` where nothing is."""
    found = root
    for name in path.split(".") if path else ():
        # A module looks its parts up where attributes are that it lacks: slow, for something done per layer.
        parts = getattr(found, "_modules", {})
        found = parts[name] if name in parts else getattr(found, name, None)
    return found
