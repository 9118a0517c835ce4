"""Mistral and Qwen2 without sliding windows, written as Llama: the same model, and a flag for biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from mlflow_safelock.errors import UnsupportedArchitectureError
from mlflow_safelock.lock import AttentionGeometry

_WINDOW_FIELDS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

# What is meant to differ: the name of the architecture, and what only Llama has.
_DIFFERENT = {
    "model_type",
    "architectures",
    "head_dim",
    "attention_bias",
    "mlp_bias",
    "pretraining_tp",
    "transformers_version",
    "_name_or_path",
}


def llama_values(
    values: Mapping[str, Any], config: PretrainedConfig, geometry: AttentionGeometry
) -> dict[str, Any]:
    """Write a configuration down as a Llama with ``attention_bias`` that means the same.

    Every field that Llama knows is compared as ``transformers`` understands it, so that no default that
    differs between the two architectures can slip in.

    Args:
        values: Contents of the ``config.json``.
        config: The same, as ``transformers`` understands it.
        geometry: The shape of the attention.

    Raises:
        UnsupportedArchitectureError: It has sliding windows, or a Llama cannot have its shape.
    """
    _refuse_windows(config)
    as_llama = {
        **{name: value for name, value in values.items() if name not in _WINDOW_FIELDS},
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "head_dim": geometry.head_dim,
        "attention_bias": True,
        "mlp_bias": False,
    }
    as_llama.update(_differing(as_llama, config))
    remaining = _differing(as_llama, config)
    if remaining:
        raise UnsupportedArchitectureError(
            f"This {config.model_type!r} cannot be written as a Llama: {', '.join(sorted(remaining))} would "
            "mean something else.",
            next_step="Lock it in memory (apply_lock), or promote it with the overlay carrier.",
        )
    return as_llama


def _refuse_windows(config: PretrainedConfig) -> None:
    windowed = [kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"]
    # Qwen2's configuration clears the window of a model that does not use it.
    if windowed or config.sliding_window is not None:
        raise UnsupportedArchitectureError(
            f"This {config.model_type!r} has a sliding window of {config.sliding_window} tokens, and a "
            "Llama, which a checkpoint with biases has to be written as, has none.",
            next_step="Lock it in memory (apply_lock), or promote it with the overlay carrier.",
        )


def _differing(as_llama: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """Fields that would mean something else in the Llama, with their value in the original."""
    try:
        llama = LlamaConfig.from_dict(dict(as_llama)).to_dict()
    except Exception as error:  # configuration classes have their own ways to reject values
        raise UnsupportedArchitectureError(
            f"This {config.model_type!r} cannot be written as a Llama: {error}",
            next_step="Lock it in memory (apply_lock), or promote it with the overlay carrier.",
        ) from error
    original = config.to_dict()
    return {
        name: original[name]
        for name in llama
        if name in original and name not in _DIFFERENT and llama[name] != original[name]
    }
