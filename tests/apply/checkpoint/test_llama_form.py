from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config

from mlflow_safelock.apply import apply_lock, geometry_from_config, save_locked_checkpoint
from mlflow_safelock.apply.checkpoint.llama_form import llama_values
from mlflow_safelock.errors import UnsupportedArchitectureError
from tests.apply.checkpoint.conftest import load
from tests.models import tiny_model

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0, "original_max_position_embeddings": 64}


def as_llama(values: dict[str, object]) -> LlamaConfig:
    config = AutoConfig.for_model(**values)
    return LlamaConfig.from_dict(llama_values(values, config, geometry_from_config(config)))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mistral", {"rms_norm_eps": 1e-3}),
        ("mistral", {"head_dim": 16}),
        ("mistral", {"tie_word_embeddings": True}),
        ("mistral", {"rope_parameters": YARN}),
        ("mistral", {"rope_parameters": DYNAMIC}),
        ("mistral", {"hidden_act": "gelu"}),
        ("mistral", {"num_key_value_heads": 4}),
        ("qwen2", {"rms_norm_eps": 1e-3, "tie_word_embeddings": True}),
        ("qwen2", {"rope_parameters": YARN, "num_key_value_heads": 1}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1}),
    ],
    ids=str,
)
def test_whatever_shapes_the_computation_is_said_in_the_llama_too(family, config, save_fine_tune, tmp_path):
    source, lock = save_fine_tune(family, **config)
    in_memory = load(source)
    apply_lock(in_memory, lock)
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    reloaded = load(tmp_path / "locked")
    assert reloaded.config.model_type == "llama"
    tokens = torch.arange(160).remainder(300)[None]  # beyond the original length of the scaled positions
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        expected = in_memory(tokens, attention_mask=mask).logits
        assert torch.allclose(reloaded(tokens, attention_mask=mask).logits, expected, atol=2e-5)


@pytest.mark.parametrize(
    "config", [MistralConfig(sliding_window=None), Qwen2Config()], ids=lambda c: c.model_type
)
def test_a_default_that_differs_between_the_architectures_is_written_down(config):
    # A config.json that says as little as it may: everything else is a default of its own architecture.
    said = {"model_type": config.model_type, "sliding_window": None}
    said |= {
        name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    }
    llama, original = as_llama(said).to_dict(), config.to_dict()
    assert LlamaConfig().max_position_embeddings != config.max_position_embeddings
    shared = set(llama) & set(original) - {"model_type", "architectures", "transformers_version"}
    assert {name for name in shared if llama[name] != original[name]} <= {"head_dim"}
    assert llama["attention_bias"] is True
    assert llama["mlp_bias"] is False


def test_configurations_as_older_versions_wrote_them_keep_their_positions():
    values = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": None,
        "sliding_window": None,
        "rope_theta": 123456.0,
        "rope_scaling": {"type": "linear", "factor": 3.0},
        "torch_dtype": "bfloat16",
        "mlp_bias": True,
    }
    llama = as_llama(values)
    assert llama.rope_parameters == MistralConfig.from_dict(values).rope_parameters
    assert llama.rope_parameters["rope_theta"] == 123456.0
    assert llama.rope_parameters["factor"] == 3.0
    assert llama.head_dim == 16
    assert llama.dtype == torch.bfloat16
    assert llama.mlp_bias is False  # Mistral has no such flag, so it meant nothing


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "mistral"},  # Mistral's default is a window of 4096 tokens
        {"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention"] * 32},
        {"model_type": "qwen2", "use_sliding_window": True},
        {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32},
    ],
    ids=str,
)
def test_windows_are_refused_wherever_they_are_said(values):
    with pytest.raises(UnsupportedArchitectureError, match="sliding window"):
        as_llama({"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, **values})


def test_a_shape_that_a_llama_cannot_have_is_refused():
    config = tiny_model("mistral", hidden_size=50).config
    with pytest.raises(UnsupportedArchitectureError, match=r"(?s)cannot be written as a Llama.*hidden size"):
        llama_values(json.loads(config.to_json_string()), config, geometry_from_config(config))
