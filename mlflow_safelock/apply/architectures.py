"""Where the attention heads of each architecture are: one table, and how it is looked up.

A head's output is a slice of the *input* of the attention output projection: head ``h`` of a layer is
``h * head_dim : (h + 1) * head_dim`` (METHOD, forge step 3). So all there is to know about an architecture is
where its decoder layers are, which module inside a layer is the output projection, how that module lays out
its weight, and whether a checkpoint of this architecture can hold a bias for it.

To support another architecture, add a row to ``ARCHITECTURES`` and run ``tests/apply/test_architectures.py``,
which checks every row numerically on a tiny random model.

This module imports neither torch nor transformers, so that a registry server can ask it about configurations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from mlflow_safelock.errors import UnsupportedArchitectureError
from mlflow_safelock.lock import AttentionGeometry

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        model_type: ``model_type`` of the configuration of the part that decodes text.
        layers: Path of the list of decoder layers, in a causal language model and in its checkpoint.
        output_projection: Path of the attention output projection inside a layer.
        layout: ``linear`` for a weight of shape ``[hidden, heads * head_dim]`` (``torch.nn.Linear``),
            ``conv1d`` for its transpose (``transformers.pytorch_utils.Conv1D``).
        output_bias: Whether the output projection of a stock model has a bias: ``always``, ``never``, or the
            name of the configuration flag that decides.
        biased_with_output: Paths inside a layer of the projections that get a bias, of zeros, when the
            output projection of a standalone checkpoint is given one.
        config_names: What the configuration calls the number of layers, the number of query heads, and the
            width of the residual stream.
        default_head_dim: Head width where the configuration has no ``head_dim``; ``None``: hidden / heads.
        standalone: How a checkpoint that stock ``transformers`` loads carries the lock's biases:
            ``own_bias`` adds them to the biases that are there; ``flag`` does so, too, and where there are
            none sets the ``output_bias`` flag; ``as_llama`` writes the same model down as a Llama, which has
            that flag; ``None`` where no exact way is known.
    """

    model_type: str
    layers: str = "model.layers"
    output_projection: str = "self_attn.o_proj"
    layout: Literal["linear", "conv1d"] = "linear"
    output_bias: str = "never"
    biased_with_output: tuple[str, ...] = ()
    config_names: tuple[str, str, str] = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    default_head_dim: int | None = None
    standalone: Literal["flag", "as_llama", "own_bias"] | None = None


GPT2_NAMES = ("n_layer", "n_head", "n_embd")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _flagged(model_type: str, default_head_dim: int | None = None) -> Architecture:
    """A Llama-like architecture whose ``attention_bias`` gives q, k, v and output projections a bias."""
    return Architecture(
        model_type,
        output_bias="attention_bias",
        biased_with_output=QKV,
        default_head_dim=default_head_dim,
        standalone="flag",
    )


def _biased(model_type: str, output_bias: str, **paths: Any) -> Architecture:
    """An architecture whose output projection usually has a bias of its own."""
    return Architecture(model_type, output_bias=output_bias, standalone="own_bias", **paths)


ARCHITECTURES: Mapping[str, Architecture] = {
    row.model_type: row
    for row in (
        # A flag in the configuration gives the output projection a bias.
        _flagged("llama"),
        _flagged("qwen3", default_head_dim=128),
        _flagged("qwen3_moe"),
        _flagged("gemma", default_head_dim=256),
        _flagged("gemma2", default_head_dim=256),
        _flagged("gemma3_text", default_head_dim=256),
        _flagged("granite"),
        _flagged("olmo"),
        _flagged("olmo2"),
        _flagged("olmo3"),
        _flagged("cohere"),
        _flagged("cohere2"),
        _flagged("smollm3"),
        _flagged("nemotron"),
        _flagged("hunyuan_v1_dense"),
        # No flag, but the same computation as a Llama with the flag. Qwen2 always has q, k and v biases.
        Architecture("mistral", biased_with_output=QKV, standalone="as_llama"),
        Architecture("qwen2", standalone="as_llama"),
        # The output projection has a bias of its own, which the lock adds to.
        _biased(
            "gpt2",
            "always",
            layers="transformer.h",
            output_projection="attn.c_proj",
            layout="conv1d",
            config_names=GPT2_NAMES,
        ),
        _biased(
            "gpt_bigcode",
            "always",
            layers="transformer.h",
            output_projection="attn.c_proj",
            config_names=GPT2_NAMES,
        ),
        _biased("opt", "enable_bias", layers="model.decoder.layers", output_projection="self_attn.out_proj"),
        _biased("gpt_neox", "attention_bias", layers="gpt_neox.layers", output_projection="attention.dense"),
        _biased("phi", "always", output_projection="self_attn.dense"),
        _biased("gpt_oss", "attention_bias", default_head_dim=64),
        _biased("starcoder2", "use_bias"),
        # Neither a bias nor a flag for one: the lock is carried in memory only.
        Architecture("mixtral"),
        Architecture("phi3"),
        Architecture("stablelm"),
    )
}
"""Every architecture that is known by name, by ``model_type``."""


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of a loaded model.

    Attributes:
        architecture: Its row in the table.
        geometry: Its shape.
        projections: The attention output projection of every layer, in order. A head's output is a slice of
            the projection's input, which is ``[..., heads * head_dim]``.
    """

    architecture: Architecture
    geometry: AttentionGeometry
    projections: tuple[nn.Module, ...]


def attention_of(model: PreTrainedModel) -> Attention:
    """Find the attention output projections of a model.

    Args:
        model: A ``transformers`` model that decodes text, bare or with a head, or a PEFT model around one.

    Raises:
        UnsupportedArchitectureError: The architecture is not in the table, or this model is not built as its
            row says.
    """
    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    architecture = architecture_of(unwrapped.config)
    geometry = geometry_from_config(unwrapped.config)
    layers = _decoder_layers(unwrapped, architecture, geometry)
    projections = tuple(_at(layer, architecture.output_projection) for layer in layers)
    for index, projection in enumerate(projections):
        _check_projection(projection, index, architecture, geometry)
    return Attention(architecture, geometry, projections)


def architecture_of(config: PretrainedConfig | Mapping[str, Any]) -> Architecture:
    """The row of the table for a configuration.

    Args:
        config: A ``transformers`` configuration, or the contents of a ``config.json``. Where the text model's
            configuration is nested in it, the nested one counts.

    Raises:
        UnsupportedArchitectureError: The architecture is not in the table.
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
        UnsupportedArchitectureError: The architecture is not in the table, or the configuration does not
            describe the shape of its attention.
    """
    values = _text_config(config)
    architecture = _row(values)
    layers, heads, hidden = (values.get(name) for name in architecture.config_names)
    head_dim = values.get("head_dim") or architecture.default_head_dim
    try:
        if head_dim is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            head_dim, rest = divmod(hidden, heads)
            if rest:
                raise ValueError(f"hidden size {hidden} is not a multiple of {heads} heads")
        shape = {"layers": layers, "heads": heads, "head_dim": head_dim, "hidden": hidden}
        return AttentionGeometry.model_validate(shape)
    except (ValidationError, ValueError) as error:
        described = ", ".join(
            f"{name}={values.get(name)!r}" for name in (*architecture.config_names, "head_dim")
        )
        raise UnsupportedArchitectureError(
            f"The configuration of this {architecture.model_type!r} model does not describe its attention: "
            f"{described}.",
            next_step="Use the config.json that transformers' save_pretrained writes.",
        ) from error


def _row(values: Mapping[str, Any]) -> Architecture:
    model_type = values.get("model_type")
    architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if architecture is None:
        raise UnsupportedArchitectureError(
            f"The attention heads of model type {model_type!r} are not known. "
            f"Known types: {', '.join(sorted(ARCHITECTURES))}.",
            next_step="docs/applying.md says how to add a row for it to the table of architectures.",
        )
    return architecture


def _text_config(config: PretrainedConfig | Mapping[str, Any]) -> Mapping[str, Any]:
    values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    nested = values.get("text_config")
    return nested if isinstance(nested, Mapping) else values


def _decoder_layers(
    model: PreTrainedModel, architecture: Architecture, geometry: AttentionGeometry
) -> Iterable[nn.Module]:
    for root in (model, model.get_decoder()):
        # A bare model lacks the path's first names, which a model with a language modelling head has.
        for path in _suffixes(architecture.layers):
            layers = _at(root, path)
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


def _suffixes(path: str) -> Iterator[str]:
    names = path.split(".")
    return (".".join(names[start:]) for start in range(len(names)))


def _at(root: Any, path: str) -> Any:
    return reduce(lambda module, name: getattr(module, name, None), path.split("."), root)
