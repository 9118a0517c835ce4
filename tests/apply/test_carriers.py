from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from mlflow_safelock.apply import apply_lock, attention_of, handle_of
from mlflow_safelock.errors import AlreadyLockedError, VerificationError
from tests.apply.conftest import lock_for, logits
from tests.models import tiny_model

# PEFT asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")


class EightBitLinear(nn.Module):
    """A projection whose weight is no plain matrix: whole numbers with a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def dense_weight(self) -> torch.Tensor:
        return self.packed.float() * self.scale

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.dense_weight().T


def quantised_llama() -> nn.Module:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = EightBitLinear(layer.self_attn.o_proj)
    return model


def dequantised(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        weight = layer.self_attn.o_proj.dense_weight()
        layer.self_attn.o_proj = nn.Linear(*weight.shape[::-1], bias=False)
        layer.self_attn.o_proj.weight = nn.Parameter(weight)
    return plain


def with_adapter(target_modules: list[str]) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=target_modules, init_lora_weights=False)
        return get_peft_model(tiny_model("llama"), config).eval()


def test_a_quantised_projection_is_locked_through_its_input_and_unlocked_without_a_trace():
    model = quantised_llama()
    lock, unlocked, keys = lock_for(model), logits(model), list(model.state_dict())
    plain = dequantised(model)
    apply_lock(plain, lock, 3.0)
    handle = apply_lock(model, lock, 3.0)
    handle.verify()
    assert torch.allclose(logits(model), logits(plain), atol=2e-5)
    assert (logits(model) - unlocked).abs().max() > 0.05
    assert list(model.state_dict()) == keys
    handle.remove()
    handle.remove()
    assert torch.equal(logits(model), unlocked)
    assert not any(projection._forward_pre_hooks for projection in attention_of(model).projections)


def test_a_copy_of_a_model_locked_through_its_inputs_stays_locked_on_its_own():
    model = quantised_llama()
    unlocked, lock = logits(model), lock_for(model)
    handle = apply_lock(model, lock)
    locked, twin = logits(model), copy.deepcopy(model)
    handle.remove()
    assert torch.equal(logits(twin), locked)
    with pytest.raises(AlreadyLockedError):
        apply_lock(twin, lock)
    handle_of(twin).verify()
    handle_of(twin).remove()
    assert torch.equal(logits(twin), unlocked)


def test_a_hook_follows_the_model_into_another_dtype():
    model = tiny_model("llama")
    lock = lock_for(model)
    for layer in model.model.layers:
        layer.self_attn.o_proj = nn.Sequential(layer.self_attn.o_proj)
    before, handle = logits(model), apply_lock(model, lock)
    in_float32 = logits(model)
    assert (in_float32 - before).abs().max() > 0.05
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert (logits(model).float() - in_float32).abs().max() < 0.3
    model.to(torch.float32)
    handle.verify()
    handle.remove()


def test_verify_and_remove_notice_a_hook_that_is_gone():
    model = quantised_llama()
    lock = lock_for(model)
    handle = apply_lock(model, lock)
    attention_of(model).projections[lock.layers[0]]._forward_pre_hooks.clear()
    with pytest.raises(VerificationError, match=f"Layer {lock.layers[0]}: the hook"):
        handle.verify()
    with pytest.raises(VerificationError, match=f"Layer {lock.layers[0]}: the hook"):
        handle.remove()


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], ["q_proj", "o_proj"]])
def test_an_adapter_that_is_not_merged_is_locked_as_the_merged_model_is(target_modules):
    model = with_adapter(target_modules)
    merged = copy.deepcopy(model).merge_and_unload()
    unlocked, lock = logits(model), lock_for(merged)
    apply_lock(merged, lock, 2.0)
    handle = apply_lock(model, lock, 2.0)
    handle.verify()
    assert torch.allclose(logits(model), logits(merged), atol=1e-5)
    handle.remove()
    assert torch.equal(logits(model), unlocked)


def test_a_projection_class_that_is_not_known_to_be_plain_is_not_given_a_bias():
    class Packed(nn.Linear):
        """Its forward pass ignores the bias, as some quantised classes do."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs @ self.weight.T

    model = tiny_model("llama")
    lock, reference = lock_for(model), copy.deepcopy(model)
    for layer in model.model.layers:
        layer.self_attn.o_proj.__class__ = Packed
    apply_lock(reference, lock)
    apply_lock(model, lock)
    assert torch.allclose(logits(model), logits(reference), atol=2e-5)
