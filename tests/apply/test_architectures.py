from __future__ import annotations

import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mlflow_safelock.apply import ARCHITECTURES, attention_of, geometry_from_config
from mlflow_safelock.errors import UnsupportedArchitectureError
from mlflow_safelock.lock import AttentionGeometry
from tests.apply.conftest import TOKENS
from tests.models import tiny_model

FAMILIES = sorted(ARCHITECTURES)


def _numbered_heads(module, query, key, value, attention_mask, **kwargs):
    """Stands in for softmax attention: every number of head ``h``'s output is ``h + 1``."""
    batch, heads, positions, _ = query.shape
    numbers = torch.arange(1.0, heads + 1)[:, None].expand(batch, positions, heads, value.shape[-1])
    return numbers.contiguous(), None


class _NumberedProducts(TorchDispatchMode):
    """The same for models that have no place for another attention: their last product of a layer is it."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self._shape = heads, head_dim

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        heads, head_dim = self._shape
        if func is torch.ops.aten.bmm.default and result.shape[1:] == (TOKENS.shape[1], head_dim):
            numbers = torch.arange(1.0, heads + 1).repeat(len(TOKENS))
            return numbers[:, None, None].expand_as(result).clone()
        return result


@pytest.fixture
def numbered_attention() -> str:
    ALL_ATTENTION_FUNCTIONS.register("numbered_heads", _numbered_heads)
    ALL_MASK_ATTENTION_FUNCTIONS.register("numbered_heads", eager_mask)
    return "numbered_heads"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_head_is_the_slice_of_the_projection_input_that_its_number_says(family, numbered_attention):
    model = tiny_model(family)
    attention = attention_of(model)
    geometry = attention.geometry
    if family in ("bloom", "codegen", "gptj", "mpt"):
        numbered: AbstractContextManager = _NumberedProducts(geometry.heads, geometry.head_dim)
    else:
        model.set_attn_implementation(numbered_attention)
        numbered = nullcontext()
    seen: list[torch.Tensor] = []
    for projection in attention.projections:
        projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad(), numbered:
        model(TOKENS, attention_mask=torch.ones_like(TOKENS))
    expected = torch.arange(1.0, geometry.heads + 1).repeat_interleave(geometry.head_dim)
    assert len(seen) == geometry.layers
    for head_outputs in seen:
        assert torch.equal(head_outputs, expected.expand_as(head_outputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_says_how_a_stock_model_is_built(family):
    row, model = ARCHITECTURES[family], tiny_model(family)
    names = dict(model.named_modules())
    attention = attention_of(model)
    geometry = attention.geometry
    shape = (geometry.hidden, geometry.heads * geometry.head_dim)
    for layer, projection in enumerate(attention.projections):
        assert names[f"{row.layers}.{layer}.{row.output_projection}"] is projection
        assert tuple(projection.weight.shape) == (shape if row.layout == "linear" else shape[::-1])
        flag = row.output_bias not in ("always", "never") and getattr(model.config, row.output_bias)
        assert (projection.bias is not None) == (row.output_bias == "always" or flag)


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_is_what_the_module_computes(family):
    attention = attention_of(tiny_model(family))
    weight = attention.projections[0].weight
    weight = weight if attention.architecture.layout == "linear" else weight.T
    inputs = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pushed = attention.projections[0](inputs) - attention.projections[0](torch.zeros_like(inputs))
        assert torch.allclose(pushed, inputs @ weight.T, atol=1e-5)


# transformers itself cannot build one of these whose configuration has no head_dim.
@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family not in ("hunyuan_v1_dense", "ministral")]
)
def test_a_config_file_without_head_dim_means_what_transformers_makes_of_it(family):
    # Two layers are enough; the number of key/value heads has no usable default in some families.
    few = {ARCHITECTURES[family].config_names[0]: 2, "num_key_value_heads": 4}
    config = AutoConfig.for_model(family, **few)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    geometry = geometry_from_config({**config.to_dict(), "head_dim": None})
    assert geometry == attention_of(model).geometry
    assert attention_of(model).projections[1].weight.numel() == (
        geometry.hidden * geometry.heads * geometry.head_dim
    )


def test_head_dim_is_its_own_value_and_heads_are_query_heads():
    nemo = {
        "model_type": "mistral",
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    assert geometry_from_config(nemo) == AttentionGeometry(layers=40, heads=32, head_dim=128, hidden=5120)
    without = {**nemo, "head_dim": None}
    assert geometry_from_config(without).head_dim == 160


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
def test_a_bare_model_and_one_with_another_head_are_found(auto_class):
    model = auto_class.from_config(tiny_model("gpt2").config)
    assert attention_of(model).geometry.layers == 3


def test_a_bloom_that_uses_its_projections_without_calling_them_is_refused():
    model = tiny_model("bloom", slow_but_exact=True)
    with pytest.raises(UnsupportedArchitectureError, match=r"slow_but_exact.*no effect"):
        attention_of(model)


def test_a_head_of_latent_attention_is_as_wide_as_a_value():
    config = tiny_model("deepseek_v3").config
    assert config.head_dim == 8  # the rotated part of a key
    assert geometry_from_config(config).head_dim == config.v_head_dim == 10


def test_the_text_part_of_a_multimodal_model_counts():
    text = tiny_model("llama").config
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    assert attention_of(model).geometry == geometry_from_config(text)
    assert attention_of(model).projections[2] is model.model.language_model.layers[2].self_attn.o_proj


def test_an_unknown_type_is_refused_with_the_known_ones_and_what_to_do():
    with pytest.raises(UnsupportedArchitectureError, match=r"'mamba'.*llama.*qwen3.*docs/applying\.md"):
        geometry_from_config({"model_type": "mamba"})
    with pytest.raises(UnsupportedArchitectureError, match="'mamba'"):
        attention_of(AutoModel.from_config(AutoConfig.for_model("mamba", hidden_size=8, num_hidden_layers=1)))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"model_type": 7},
        {"model_type": "llama"},
        {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": 32},
        {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 0, "hidden_size": 32},
        {"model_type": "llama", "num_hidden_layers": "2", "num_attention_heads": 4, "hidden_size": 32},
        {"model_type": "llama", "num_hidden_layers": True, "num_attention_heads": 4, "hidden_size": 32},
        {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": -32},
    ],
)
def test_a_config_that_describes_no_attention_is_refused(values):
    with pytest.raises(UnsupportedArchitectureError):
        geometry_from_config(values)


def test_a_model_that_is_not_built_as_its_type_says_is_refused():
    model = tiny_model("llama")
    del model.model.layers[1].self_attn.o_proj
    with pytest.raises(UnsupportedArchitectureError, match=r"layer 1.*"):
        attention_of(model)
    model = tiny_model("llama")
    model.model.layers = model.model.layers[:2]
    with pytest.raises(UnsupportedArchitectureError, match="no list of 3 decoder layers"):
        attention_of(model)
    model = tiny_model("llama")
    model.model.layers[2].self_attn.o_proj = torch.nn.Linear(24, 48)  # one head of four was pruned
    with pytest.raises(UnsupportedArchitectureError, match=r"layer 2.* takes 24 numbers"):
        attention_of(model)


def test_a_registry_server_can_ask_about_a_config_without_loading_torch():
    asked = (
        "import sys; from mlflow_safelock.apply import geometry_from_config; "
        "geometry_from_config({'model_type': 'llama', 'num_hidden_layers': 2, 'num_attention_heads': 4, "
        "'hidden_size': 32}); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", asked], check=False).returncode == 0
