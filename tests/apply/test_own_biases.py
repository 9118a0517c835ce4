"""What a model's own biases have of a lock's push."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mlflow_safelock.apply import attention_of
from mlflow_safelock.apply.architectures import ARCHITECTURES
from mlflow_safelock.apply.displacement import base_biases
from mlflow_safelock.apply.own_biases import FEED_FORWARD, Fault, fault_of, head_outputs
from mlflow_safelock.forging.base_weights import unit_biases_of
from mlflow_safelock.lock import SafetyLock
from tests.models import random_lock, tiny_model

ALPHA = 6.0
OUTPUT, DOWN, UP = "self_attn.o_proj", "mlp.down_proj", "mlp.fc2"
Shares = dict[int, dict[str, float]]


@pytest.fixture(scope="module")
def lock() -> SafetyLock:
    attention = attention_of(tiny_model("llama"))
    plain = random_lock(attention.geometry, seed=0)
    return replace(plain, unit_biases=unit_biases_of(attention, plain.heads))


def pushes(lock: SafetyLock) -> dict[int, npt.NDArray[np.float64]]:
    return {layer: push.numpy() for layer, push in base_biases(lock, ALPHA).items()}


def fault(lock: SafetyLock, shares: Shares, family: str = "llama", of: int | None = None) -> Fault | None:
    """What is found where biases are these shares of a layer's push, or of the push in layer ``of``."""
    made = pushes(lock)
    biases = {
        layer: {path: share * made[layer if of is None else of] for path, share in inside.items()}
        for layer, inside in shares.items()
    }
    return fault_of(biases, {}, {}, ARCHITECTURES[family], lock, ALPHA)


@pytest.mark.parametrize("path", [OUTPUT, *FEED_FORWARD])
@pytest.mark.parametrize(
    ("share", "is_lock"),
    [(-0.51, False), (-0.49, None), (0.49, None), (0.51, True), (-1.0, False), (1.0, True)],
)
def test_half_of_the_push_counts(lock: SafetyLock, path: str, share: float, is_lock: bool | None) -> None:
    # In an architecture whose models have biases anyhow: those of other layers are not counted.
    found = fault(lock, {lock.layers[-1]: {path: share}}, "starcoder2")
    assert (found and found.is_lock) is is_lock
    if found is not None:
        assert f"{abs(share):.0%}" in found.what
        assert f"layer {lock.layers[-1]}" in found.what


def test_what_several_kinds_take_back_adds_up(lock: SafetyLock) -> None:
    layer = lock.layers[0]
    assert fault(lock, {layer: {OUTPUT: -0.26, DOWN: -0.26}}, "starcoder2") == Fault(
        False, layer, f"take back 52% of what the lock at alpha 6 adds in layer {layer}"
    )
    along = fault(lock, {layer: {OUTPUT: 0.26, DOWN: 0.26}}, "starcoder2")
    assert along is not None
    assert along.is_lock


def test_no_kind_makes_up_for_another(lock: SafetyLock) -> None:
    """A bias may be stored that the model does not have."""
    taken = fault(lock, {lock.layers[0]: {OUTPUT: -0.3, DOWN: -0.3, UP: 0.45}}, "starcoder2")
    assert taken is not None
    assert not taken.is_lock
    along = fault(lock, {lock.layers[0]: {OUTPUT: 0.3, DOWN: 0.3, UP: -0.45}}, "starcoder2")
    assert along is not None
    assert along.is_lock


@pytest.mark.parametrize(("family", "counts"), [("llama", True), ("starcoder2", False)])
def test_biases_of_later_layers_count_where_models_have_them_by_a_flag(
    lock: SafetyLock, family: str, counts: bool
) -> None:
    first, *_, last = lock.layers
    assert first < last
    found = fault(lock, {last: {DOWN: -0.9}}, family, of=first)
    if counts:
        assert found is not None
        assert "layer" in found.what
    else:
        assert found is None


def test_no_later_layer_makes_up_for_what_is_taken_back(lock: SafetyLock) -> None:
    first, *_, last = lock.layers
    taken = fault(lock, {first: {OUTPUT: -1.0}, last: {OUTPUT: 0.8}}, of=first)
    assert taken is not None
    assert not taken.is_lock
    # Nor does a third of it in each of three layers pass.
    thirds = fault(lock, {layer: {OUTPUT: -0.6 / len(lock.layers)} for layer in lock.layers}, of=first)
    assert thirds is not None
    assert not thirds.is_lock


def test_the_worst_of_the_experts_counts(lock: SafetyLock) -> None:
    layer = lock.layers[0]
    push = pushes(lock)[layer]
    biases = {layer: {"mlp.experts.down_proj": np.stack([push, 0 * push, -push])}}
    found = fault_of(biases, {}, {}, ARCHITECTURES["gpt_oss"], lock, ALPHA)
    assert found is not None
    assert not found.is_lock
    along = {layer: {"mlp.experts.down_proj": np.stack([0 * push, push])}}
    found = fault_of(along, {}, {}, ARCHITECTURES["gpt_oss"], lock, ALPHA)
    assert found is not None
    assert found.is_lock


def test_what_does_not_arrive_counts_as_taken_back(lock: SafetyLock) -> None:
    layer = lock.layers[0]
    biases = {layer: {OUTPUT: -0.2 * pushes(lock)[layer]}}
    architecture = ARCHITECTURES["starcoder2"]
    assert fault_of(biases, {}, {layer: 0.9}, architecture, lock, ALPHA) is None
    found = fault_of(biases, {}, {layer: 0.65}, architecture, lock, ALPHA)
    assert found == Fault(
        False, layer, f"take back 20% of what the lock at alpha 6 adds in layer {layer}, of which 65% arrives"
    )


def test_query_heads_that_share_values_have_their_biases(lock: SafetyLock) -> None:
    geometry = lock.geometry
    of_each = np.arange(2.0 * geometry.head_dim).reshape(2, -1)
    found = head_outputs({1: {"self_attn.v_proj": of_each.ravel()}}, ARCHITECTURES["llama"], geometry)
    expected = np.repeat(of_each, geometry.heads // 2, axis=0)
    assert np.array_equal(found[1], expected)


def feed_forward_biases(family: str) -> set[str]:
    """The paths in a layer of projections to the residual stream with a bias, but the attention's."""
    flags = {"mlp_bias": True} if family in ("llama", "granite") else {}
    attention = attention_of(tiny_model(family, **flags))
    found = set()
    for name, module in attention.layers[0].named_modules():
        bias = getattr(module, "bias", None)
        if isinstance(module, nn.Linear | Conv1D) and isinstance(bias, torch.Tensor):
            makes_hidden = bias.shape == (attention.geometry.hidden,)
            if makes_hidden and "attn" not in name and "attention" not in name:
                found.add(name)
    found |= {
        name.removesuffix("_bias")
        for name, _ in attention.layers[0].named_parameters()
        if name.endswith("down_proj_bias")
    }
    return found


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_feed_forward_bias_of_the_table_is_looked_at(family: str) -> None:
    assert feed_forward_biases(family) <= {*FEED_FORWARD}


def test_numbers_that_are_none_count_as_taken_back(lock: SafetyLock) -> None:
    first, last = lock.layers[0], lock.layers[-1]
    architecture = ARCHITECTURES["llama"]
    found = fault_of({}, {first: math.nan}, {}, architecture, lock, ALPHA)
    assert found is not None
    assert not found.is_lock
    assert "not finite" in found.what
    biases = {last: {OUTPUT: pushes(lock)[last] * math.nan}}
    found = fault_of(biases, {first: 0.0}, {}, architecture, lock, ALPHA)
    assert found is not None
    assert "not finite" in found.what
    # And they hide nothing.
    taken = {last: {OUTPUT: -pushes(lock)[last]}}
    found = fault_of(taken, {first: math.nan, last: math.nan}, {}, architecture, lock, ALPHA)
    assert found is not None
