from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, MistralConfig, PretrainedConfig, Qwen2Config

from mlflow_safelock.apply import apply_lock, geometry_from_config, save_locked_checkpoint
from mlflow_safelock.apply.checkpoint.rewritten import rewritten_values
from mlflow_safelock.errors import UnsupportedArchitectureError
from tests.apply.checkpoint.conftest import load
from tests.models import tiny_model

SLIDING = "sliding_attention"
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0, "original_max_position_embeddings": 64}


def rewritten(values: dict[str, object]) -> PretrainedConfig:
    config = AutoConfig.for_model(**values)
    return AutoConfig.for_model(**rewritten_values(values, config, geometry_from_config(config)))


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
        ("mistral", {"sliding_window": 32, "rope_parameters": YARN}),
        ("ministral", {"sliding_window": 32, "layer_types": [SLIDING, "full_attention", SLIDING]}),
        ("ministral", {"sliding_window": 200, "layer_types": ["full_attention"] * 3}),
        ("ministral", {"sliding_window": 32, "head_dim": 16, "tie_word_embeddings": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}),
    ],
    ids=str,
)
def test_whatever_shapes_the_computation_is_said_in_the_other_too(family, config, save_fine_tune, tmp_path):
    source, lock = save_fine_tune(family, **config)
    in_memory = load(source)
    apply_lock(in_memory, lock)
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    reloaded = load(tmp_path / "locked")
    windowed = SLIDING in (getattr(reloaded.config, "layer_types", None) or ())
    assert reloaded.config.model_type == ("smollm3" if windowed else "llama")
    tokens = torch.arange(160).remainder(300)[None]  # beyond the original length of the scaled positions
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        expected = in_memory(tokens, attention_mask=mask).logits
        assert torch.allclose(reloaded(tokens, attention_mask=mask).logits, expected, atol=2e-5)
    asked = {"attention_mask": mask[:, :40], "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        reloaded.generate(tokens[:, :40], **asked), in_memory.generate(tokens[:, :40], **asked)
    )


@pytest.mark.parametrize(
    "config", [MistralConfig(sliding_window=None), Qwen2Config()], ids=lambda c: c.model_type
)
def test_a_default_that_differs_between_the_architectures_is_written_down(config):
    # A config.json that says as little as it may: everything else is a default of its own architecture.
    said = {"model_type": config.model_type, "sliding_window": None}
    said |= {
        name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    }
    llama, original = rewritten(said).to_dict(), config.to_dict()
    assert AutoConfig.for_model("llama").max_position_embeddings != config.max_position_embeddings
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
    llama = rewritten(values)
    assert llama.rope_parameters == MistralConfig.from_dict(values).rope_parameters
    assert llama.rope_parameters["rope_theta"] == 123456.0
    assert llama.rope_parameters["factor"] == 3.0
    assert llama.head_dim == 16
    assert llama.dtype == torch.bfloat16
    assert llama.mlp_bias is False  # Mistral has no such flag, so it meant nothing


@pytest.mark.parametrize(
    ("values", "windowed"),
    [
        ({"model_type": "mistral"}, 32),  # Mistral's default is a window of 4096 tokens
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention"] * 32}, 32),
        ({"model_type": "ministral"}, 32),
        ({"model_type": "qwen2", "use_sliding_window": True}, 4),  # from the 28th layer on
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": [SLIDING] * 32}, 32),
    ],
    ids=str,
)
def test_windows_are_kept_in_the_layers_that_have_them(values, windowed):
    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    found, original = rewritten({**shape, **values}), AutoConfig.for_model(**shape, **values)
    assert found.model_type == "smollm3"
    assert (found.use_sliding_window, found.sliding_window) == (True, original.sliding_window)
    assert found.layer_types.count(SLIDING) == windowed
    assert all(found.no_rope_layers)
    assert found.rope_parameters == original.rope_parameters


def test_a_shape_that_the_other_cannot_have_is_refused():
    config = tiny_model("mistral", hidden_size=50).config
    with pytest.raises(UnsupportedArchitectureError, match=r"(?s)cannot be written as 'llama'.*hidden size"):
        rewritten_values(json.loads(config.to_json_string()), config, geometry_from_config(config))
