"""What a lock adds in a loaded model, whatever its projections are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mlflow_safelock.apply import apply_lock, attention_of
from mlflow_safelock.apply.displacement import base_biases
from mlflow_safelock.apply.effect import check_effect, shares_of
from mlflow_safelock.apply.in_force import made_of, pushes_in_force
from mlflow_safelock.errors import LockWithoutEffectError, VerificationError
from mlflow_safelock.flavors.own_biases import OwnBiases
from mlflow_safelock.forging.base_weights import unit_biases_of
from mlflow_safelock.lock import SafetyLock
from tests.models import random_lock, tiny_model


class Packed(nn.Module):
    """A projection with its weight in 8 bits and a scale for each row, as quantisers keep it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        scales = weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scales).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("own", bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.codes * self.scales, self.own)


def known(model: Any) -> SafetyLock:
    attention = attention_of(model)
    lock = random_lock(attention.geometry, heads=6)
    return replace(lock, unit_biases=unit_biases_of(attention, lock.heads))


@torch.no_grad()
def packed(model: Any) -> Any:
    for layer in model.model.layers:
        own = layer.self_attn.o_proj
        layer.self_attn.o_proj = Packed(own.weight, own.bias)
    return model


def pushes(model: Any, lock: SafetyLock) -> dict[int, torch.Tensor]:
    with apply_lock(model, lock, 6.0):
        return pushes_in_force(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"attention_bias": True}])
@pytest.mark.parametrize("change", [lambda model: model, packed], ids=["plain", "packed"])
def test_it_is_what_the_base_makes_without_the_models_own_bias(
    config: dict[str, Any], change: Any, dtype: torch.dtype
) -> None:
    lock = known(tiny_model("llama", **config))
    found = pushes(change(tiny_model("llama", **config).to(dtype)), lock)
    expected = base_biases(lock, 6.0)
    assert found.keys() == expected.keys()
    for layer, push in expected.items():
        np.testing.assert_allclose(found[layer].double(), push, atol=0.02 * float(push.abs().max()))
    assert all(abs(share - 1) < 0.01 for share in shares_of(found, lock, 6.0).values())


@torch.no_grad()
def test_adapters_count_as_far_as_they_are_switched_on() -> None:
    lock, base = known(tiny_model("llama")), tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=8, target_modules=["o_proj"], lora_alpha=8)).eval()
    for layer in adapted.base_model.model.model.layers:
        projection = layer.self_attn.o_proj
        down, up = projection.lora_A["default"].weight, projection.lora_B["default"].weight
        down.copy_(torch.linalg.qr(torch.randn(down.shape[1], 8, generator=generator))[0].T)
        up.copy_(-projection.base_layer.weight @ down.T)
    with_it = shares_of(pushes(adapted, lock), lock, 6.0)
    with adapted.disable_adapter():
        without = shares_of(pushes(adapted, lock), lock, 6.0)
    merged = shares_of(pushes(adapted.merge_and_unload(), lock), lock, 6.0)
    assert without == pytest.approx(dict.fromkeys(lock.layers, 1.0), abs=1e-4)
    assert with_it == pytest.approx(merged, abs=1e-4)
    assert all(share < 0.95 for share in with_it.values())


@pytest.mark.parametrize("change", [lambda model: model, packed], ids=["plain", "packed"])
def test_the_layer_in_which_too_little_arrives_is_named(change: Any) -> None:
    lock, model = known(tiny_model("llama")), tiny_model("llama")
    layer = lock.layers[-1]
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight.mul_(0.4)
    found = pushes(change(model), lock)
    with pytest.raises(LockWithoutEffectError, match=rf"40% arrives in layer {layer} of my model.*Use a"):
        check_effect(found, lock, 6.0, "my model")
    check_effect(found, replace(lock, unit_biases=None), 6.0, "my model")


def test_a_projection_that_cannot_be_called_is_an_error_that_says_so() -> None:
    lock, model = known(tiny_model("llama")), packed(tiny_model("llama"))
    with apply_lock(model, lock, 6.0):
        projection = model.model.layers[lock.layers[0]].self_attn.o_proj
        projection.codes = torch.zeros(3, 3)
        with pytest.raises(VerificationError, match=rf"Layer {lock.layers[0]}: .* cannot be called"):
            pushes_in_force(model)


class ScaledByBlocks(nn.Module):
    """A projection that scales blocks of its input by the largest number in them, as float8 kernels do."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        blocks = inputs.unflatten(-1, (-1, 8))
        scales = blocks.abs().amax(dim=-1, keepdim=True) / 448
        return nn.functional.linear(((blocks / scales).round() * scales).flatten(-2), self.weight)


def test_a_projection_that_takes_no_block_of_zeros_is_asked_with_others() -> None:
    model = tiny_model("llama")
    lock = known(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj = ScaledByBlocks(layer.self_attn.o_proj.weight)
    assert shares_of(pushes(model, lock), lock, 6.0) == pytest.approx(
        dict.fromkeys(lock.layers, 1.0), abs=0.05
    )


def test_what_a_constant_makes_of_such_a_projection_is_told() -> None:
    model = tiny_model("llama")
    weight = attention_of(model).projections[0].weight
    constant = torch.arange(32.0)
    constant[8:16] = 0
    made = made_of(ScaledByBlocks(weight.detach()), constant, 0, model)
    expected = weight @ constant
    assert (made - expected).norm() < 0.02 * expected.norm()


def test_what_values_make_is_asked_of_such_a_projection_too() -> None:
    """Values that take the push back through a projection that makes no number of a block of zeros."""
    model = tiny_model("qwen2")
    lock, attention = known(model), attention_of(model)
    with torch.no_grad():
        for layer, push in base_biases(lock, 6.0).items():
            projection, values = attention.projections[layer], model.model.layers[layer].self_attn.v_proj
            width = lock.geometry.head_dim
            shared = lock.geometry.heads // (len(values.bias) // width)
            every = torch.eye(len(values.bias)).unflatten(0, (-1, width)).repeat_interleave(shared, dim=0)
            made = projection.weight.double() @ every.flatten(0, 1).double()
            values.bias.copy_(torch.linalg.lstsq(made, -2.0 * push[:, None]).solution[:, 0])
            model.model.layers[layer].self_attn.o_proj = ScaledByBlocks(projection.weight)
    own = OwnBiases(model, lock.layers)
    with pytest.raises(VerificationError, match="take back"):
        own.check(lock, 6.0, dict.fromkeys(lock.layers, 1.0), "the model")


def test_a_projection_that_cannot_be_called_is_an_error_of_ours() -> None:
    class Broken(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no kernel for this device")

    model = tiny_model("qwen2")
    lock = known(model)
    for layer in model.model.layers:
        layer.self_attn.v_proj.bias.data.fill_(1.0)
        layer.self_attn.o_proj = Broken(32, 48, bias=False)
    with pytest.raises(VerificationError, match=r"cannot be called.*no kernel for this device"):
        OwnBiases(model, lock.layers)


class Scaled(nn.Module):
    """An adapter around a projection that multiplies what comes out, as IA3's do."""

    def __init__(self, base_layer: nn.Module, scale: float) -> None:
        super().__init__()
        self.base_layer, self.scale = base_layer, scale

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.scale * self.base_layer(inputs)


@pytest.mark.parametrize(("scale", "takes_back"), [(3.0, True), (1.0, False)])
@torch.no_grad()
def test_the_bias_below_an_adapter_is_known_of_a_projection_without_a_plain_weight(
    scale: float, takes_back: bool
) -> None:
    model = tiny_model("llama", mlp_bias=True)
    lock = known(model)
    for layer in model.model.layers:
        layer.mlp.down_proj.bias.zero_()
    for layer, push in base_biases(lock, 6.0).items():
        mlp = model.model.layers[layer].mlp
        plain = mlp.down_proj
        plain.bias.copy_(-push / 3)
        below = Packed(plain.weight, plain.bias)
        below.in_features, below.bias = plain.in_features, plain.bias
        mlp.down_proj = Scaled(below, scale)
    own = OwnBiases(model, lock.layers)
    arriving = dict.fromkeys(lock.layers, 1.0)
    if takes_back:
        with pytest.raises(VerificationError, match="take back"):
            own.check(lock, 6.0, arriving, "the model")
    else:
        own.check(lock, 6.0, arriving, "the model")


@torch.no_grad()
def test_the_bias_below_an_adapter_of_a_projection_of_unknown_width_is_an_error_with_what_to_do() -> None:
    model = tiny_model("llama", mlp_bias=True)
    lock = known(model)
    for layer in model.model.layers:
        plain = layer.mlp.down_proj
        below = Packed(plain.weight, plain.bias)
        below.bias = plain.bias
        layer.mlp.down_proj = Scaled(below, 3.0)
    with pytest.raises(VerificationError, match=r"how wide the input of a Packed") as refused:
        OwnBiases(model, lock.layers)
    assert "merge_and_unload" in refused.value.next_step


def test_a_bias_that_was_taken_away_is_an_error_of_ours() -> None:
    model = tiny_model("llama")
    lock = known(model)
    apply_lock(model, lock)
    attention_of(model).projections[lock.layers[-1]].bias = None
    with pytest.raises(VerificationError, match=f"Layer {lock.layers[-1]}: the bias .* is gone"):
        pushes_in_force(model)
