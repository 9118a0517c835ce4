"""Finding the attention heads of a loaded model whose architecture nobody described.

By structure: the configuration says how many layers and heads there are and how wide the residual stream and
a head are, so an output projection is a module of a layer that maps ``heads * head_dim`` to ``hidden``. Where
these are equal the query projection is one, too. So candidates are told apart by what comes in (``probing``),
and there has to be exactly one in each layer, at the same place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from mlflow_safelock.apply.described import HOW_TO_DESCRIBE
from mlflow_safelock.apply.description import Architecture
from mlflow_safelock.apply.probing import check_displacing, takes_head_outputs
from mlflow_safelock.errors import UnsupportedArchitectureError
from mlflow_safelock.lock import AttentionGeometry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "hidden_dim")
_HEAD_DIM = ("head_dim", "v_head_dim")


def discovered(model: PreTrainedModel, values: Mapping[str, Any]) -> Architecture:
    """Find the attention output projections of a model, and make sure that they are.

    The model runs on a few random tokens, five times, and is left as it was.

    Args:
        model: A model that decodes text, with its weights in memory.
        values: The configuration of the part that decodes text.

    Returns:
        What the table would say of its architecture, were it in it. ``standalone`` is ``None``: no checkpoint
        was looked at.

    Raises:
        UnsupportedArchitectureError: They were not found, or more were found than there are, or they could
            not be verified; with the candidates, and how to describe the architecture.
    """
    try:
        architecture, projections, geometry = _found(model, values)
        check_displacing(model, projections, geometry, f"{architecture.output_projection!r}")
    except UnsupportedArchitectureError as error:
        model_type = values.get("model_type")
        raise UnsupportedArchitectureError(
            f"The attention heads of model type {model_type!r} are not known, and were not found in this "
            f"{type(model).__name__}: {error.cause}",
            next_step=HOW_TO_DESCRIBE.format(model_type=model_type),
        ) from error
    return architecture


def _found(
    model: PreTrainedModel, values: Mapping[str, Any]
) -> tuple[Architecture, list[nn.Module], AttentionGeometry]:
    if values.get("is_encoder_decoder"):
        raise UnsupportedArchitectureError("It has an encoder besides the decoder.")
    layers, heads, hidden = (_name_in(values, names) for names in (_LAYERS, _HEADS, _HIDDEN))
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == values[layers]
    ]
    named: set[str] = set()
    matching: list[tuple[str, str, str | None, list[nn.Module]]] = []
    for path, modules in lists:
        for name, head_dim in _head_dims(values, heads, hidden):
            widths = values[heads] * head_dim, values[hidden]
            candidates = [dict(_candidates(layer, widths)) for layer in modules]
            if not all(candidates):
                continue
            named.update(f"{path}.*.{place}" for layer in candidates for place in layer)
            geometry = AttentionGeometry(
                layers=len(modules), heads=values[heads], head_dim=head_dim, hidden=values[hidden]
            )
            matching += [
                (path, place, name, projections)
                for place, projections in _verified(model, candidates, geometry).items()
            ]
    places = {f"{path}.*.{place}" for path, place, _, _ in matching}
    if len(places) != 1:
        shown = ", ".join(sorted(places or named)) or "none"
        what = "Head outputs, and nothing else, go into several" if places else "No module gets head outputs"
        raise UnsupportedArchitectureError(
            f"{what} in each of {values[layers]} layers. Candidates, by their widths: {shown}."
        )
    path, place, name, projections = matching[0]
    width = _widths(projections[0])[0]
    architecture = Architecture(
        model_type=str(values["model_type"]),
        layers=path,
        output_projection=place,
        layout="conv1d" if isinstance(projections[0], Conv1D) else "linear",
        output_bias="always" if all(_has_bias(projection) for projection in projections) else "never",
        config_names=(layers, heads, hidden, name or "head_dim"),
    )
    geometry = AttentionGeometry(
        layers=len(projections), heads=values[heads], head_dim=width // values[heads], hidden=values[hidden]
    )
    return architecture, projections, geometry


def _verified(
    model: PreTrainedModel, candidates: list[dict[str, nn.Module]], geometry: AttentionGeometry
) -> dict[str, list[nn.Module]]:
    """The places at which every layer has a module that the heads' outputs go into."""
    everything = [(place, module) for layer in candidates for place, module in layer.items()]
    verdicts = takes_head_outputs(model, [module for _, module in everything], geometry)
    found: dict[str, list[nn.Module]] = {}
    for (place, module), verdict in zip(everything, verdicts, strict=True):
        if verdict:
            found.setdefault(place, []).append(module)
    return {place: modules for place, modules in found.items() if len(modules) == len(candidates)}


def _candidates(layer: nn.Module, widths: tuple[int, int]) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a layer that map the one width to the other, but for what such a module is made of."""
    outer: list[str] = []
    for path, module in layer.named_modules():
        inside = any(path.startswith(f"{name}.") for name in outer)
        if not inside and _widths(module) == widths:
            outer.append(path)
            yield path, module


def _widths(module: nn.Module) -> tuple[int, int]:
    """How wide input and output of a linear map are; zeros for any other module."""
    # A Linear calls them in_features and out_features, a Conv1D nx and nf.
    for names in (("in_features", "out_features"), ("nx", "nf")):
        width, output = (getattr(module, name, None) for name in names)
        if isinstance(width, int) and isinstance(output, int):
            return width, output
    return 0, 0


def _has_bias(projection: nn.Module) -> bool:
    return getattr(projection, "bias", None) is not None


def _head_dims(values: Mapping[str, Any], heads: str, hidden: str) -> Iterator[tuple[str | None, int]]:
    """Widths that a head may have, and what the configuration calls them; each once."""
    seen: set[int] = set()
    for name in _HEAD_DIM:
        width = values.get(name)
        if isinstance(width, int) and width > 0 and width not in seen:
            seen.add(width)
            yield name, width
    width, rest = divmod(values[hidden], values[heads])
    if not rest and width not in seen and not values.get("head_dim"):
        yield None, width


def _name_in(values: Mapping[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        if type(values.get(name)) is int and values[name] > 0:
            return name
    raise UnsupportedArchitectureError(f"Its configuration has none of {', '.join(names)}.")
