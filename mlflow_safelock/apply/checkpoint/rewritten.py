"""Models without a flag for the bias, written down as an architecture that computes the same and has one.

Mistral, Ministral and Qwen2 are Llamas; with sliding windows they are SmolLM3s that rotate in every layer.
Tensors keep their names, so that only the configuration changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, SmolLM3Config

from mlflow_safelock.errors import UnsupportedArchitectureError
from mlflow_safelock.lock import AttentionGeometry

_WINDOW_FIELDS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

# What is meant to differ: the name of the architecture, and what only the one that is written has.
_DIFFERENT = {
    *("model_type", "architectures", "head_dim", "attention_bias", "mlp_bias", "pretraining_tp"),
    *("use_sliding_window", "no_rope_layers", "no_rope_layer_interval", "layer_types"),
    *("transformers_version", "_name_or_path"),
}

_SLIDING = "sliding_attention"


@dataclass(frozen=True)
class _Form:
    """An architecture that others are written as.

    Attributes:
        config: Its configuration's class.
        model: Its model's class, by name.
        own: Fields that it alone has, for the windows of a configuration.
    """

    config: type[PretrainedConfig]
    model: str
    own: Callable[[PretrainedConfig], dict[str, Any]]


def rewritten_values(
    values: Mapping[str, Any], config: PretrainedConfig, geometry: AttentionGeometry
) -> dict[str, Any]:
    """Write a configuration down as one with ``attention_bias`` that means the same.

    Every field that the other architecture knows is compared as ``transformers`` understands it, so that no
    default that differs between the two can slip in.

    Args:
        values: Contents of the ``config.json``.
        config: The same, as ``transformers`` understands it.
        geometry: The shape of the attention.

    Raises:
        UnsupportedArchitectureError: The other architecture cannot have its shape.
    """
    form = _form_of(config)
    rewritten = {
        **{name: value for name, value in values.items() if name not in _WINDOW_FIELDS},
        "model_type": form.config.model_type,
        "architectures": [form.model],
        "head_dim": geometry.head_dim,
        "attention_bias": True,
        "mlp_bias": False,
        **form.own(config),
    }
    rewritten.update(_differing(rewritten, config, form))
    remaining = _differing(rewritten, config, form)
    if remaining:
        raise _cannot(config, form, f"{', '.join(sorted(remaining))} would mean something else.")
    return rewritten


def rewritten_type(config: PretrainedConfig) -> str:
    """The ``model_type`` that a configuration is written down as."""
    return str(_form_of(config).config.model_type)


def _form_of(config: PretrainedConfig) -> _Form:
    return _SMOLLM3 if _SLIDING in _layer_types(config) else _LLAMA


def _layer_types(config: PretrainedConfig) -> list[str]:
    window = config.sliding_window  # Qwen2's configuration clears the window of a model that does not use it
    if config.model_type == "mistral":  # its window is in every layer, whatever else the configuration says
        return [_SLIDING if window is not None else "full_attention"] * config.num_hidden_layers
    return list(config.layer_types)


def _windows(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "layer_types": _layer_types(config),
        "no_rope_layers": [1] * config.num_hidden_layers,
    }


_LLAMA = _Form(LlamaConfig, "LlamaForCausalLM", lambda config: {})
_SMOLLM3 = _Form(SmolLM3Config, "SmolLM3ForCausalLM", _windows)


def _differing(rewritten: Mapping[str, Any], config: PretrainedConfig, form: _Form) -> dict[str, Any]:
    """Fields that would mean something else in the other architecture, with their value in the original."""
    try:
        found = form.config.from_dict(dict(rewritten)).to_dict()
    except Exception as error:  # configuration classes have their own ways to reject values
        raise _cannot(config, form, str(error)) from error
    original = config.to_dict()
    return {
        name: original[name]
        for name in found
        if name in original and name not in _DIFFERENT and found[name] != original[name]
    }


def _cannot(config: PretrainedConfig, form: _Form, why: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"This {config.model_type!r} cannot be written as {form.config.model_type!r}: {why}",
        next_step="Lock it in memory (apply_lock), or promote it with the overlay carrier.",
    )
