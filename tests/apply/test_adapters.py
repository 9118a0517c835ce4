"""Adapters of which it can be told what they leave of a lock, and others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from mlflow_safelock.apply import attention_of
from mlflow_safelock.apply.adapters import LINEAR, OF_PROMPTS, refuse_untold_adapters, why_untold
from mlflow_safelock.errors import VerificationError
from tests.models import tiny_model

KINDS = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def adapted(kind: str) -> Any:
    """A tiny model, whose projections have biases, with an adapter on the output's that does something."""
    options: dict[str, Any] = {"target_modules": ["dense"]}
    if kind == "IA3":
        options["feedforward_modules"] = []
    if kind == "ADALORA":
        options["total_step"] = 10
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("phi"), KINDS[kind](**options)).eval()
    with torch.no_grad():
        for name, parameter in attention_of(model).projections[0].named_parameters():
            if "base_layer" not in name and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("kind", sorted(LINEAR))
@torch.no_grad()
def test_with_kinds_that_are_known_a_projection_is_linear(kind: str) -> None:
    if kind not in KINDS:
        pytest.skip(f"this PEFT has no {kind}")
    model = adapted(kind)
    refuse_untold_adapters(model)
    projection = attention_of(model).projections[0]
    first, second = torch.randn(2, 1, 1, 32) * 3
    constant, own = projection(torch.zeros(1, 1, 32)), projection.bias
    assert own.abs().max() > 0.01
    # Of the kinds that scale what comes out, the bias is scaled with it.
    assert torch.allclose(constant, own, atol=1e-5) == (kind != "IA3")
    both = projection(first + second) - constant
    apart = projection(first) + projection(second) - 2 * constant
    assert torch.allclose(both, apart, atol=1e-4 * float(both.abs().max()))
    plain = tiny_model("phi").model.layers[0].self_attn.dense(first)
    assert not torch.allclose(projection(first), plain, atol=1e-2), "the adapter does nothing"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"peft_type": "BEFT"}, "of the kind BEFT"),
        ({"peft_type": "LILY"}, "of the kind LILY"),
        ({"peft_type": "LN_TUNING"}, "of the kind LN_TUNING"),
        ({"peft_type": "PREFIX_TUNING"}, "of the kind PREFIX_TUNING"),
        ({"peft_type": None}, "of the kind None"),
        ({}, "of the kind None"),
        ({"peft_type": "LORA", "alora_invocation_tokens": [5, 6]}, "switched on by tokens"),
        ({"peft_type": "LORA", "lora_bias": True}, "adds a constant"),
        ({"peft_type": "LORA", "target_parameters": ["mlp.experts.down_proj_bias"]}, "changes biases"),
        ({"peft_type": "LORA", "arrow_config": {"top_k": 1}}, "chooses by its input"),
    ],
    ids=str,
)
def test_of_others_nothing_is_told(config: dict[str, Any], why: str) -> None:
    assert why in str(why_untold(config))


@pytest.mark.parametrize("parameters", [5, ["mlp.experts.down_proj"], {}, None])
def test_parameters_that_are_no_biases_are_left_alone(parameters: Any) -> None:
    assert why_untold({"peft_type": "LORA", "target_parameters": parameters}) is None


@pytest.mark.parametrize("kind", sorted(LINEAR | OF_PROMPTS))
def test_of_these_it_is(kind: str) -> None:
    assert why_untold({"peft_type": kind, "target_parameters": None, "lora_bias": False}) is None


def test_a_loaded_model_with_such_an_adapter_is_refused() -> None:
    base = tiny_model("llama")
    refuse_untold_adapters(base)
    config = LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    with pytest.raises(VerificationError, match="The adapter 'default' is switched on by tokens"):
        refuse_untold_adapters(get_peft_model(base, config))
