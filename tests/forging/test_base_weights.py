"""What a lock keeps of its base's weights: each head's unit bias, and the kinship sketch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic

from mlflow_safelock.apply import apply_lock, attention_of, base_biases
from mlflow_safelock.errors import ApplyError, ForgeError
from mlflow_safelock.forging import forge
from mlflow_safelock.forging.base_weights import kinship_of, sketch_of, unit_biases_of
from mlflow_safelock.formats import lock_from_bytes, lock_to_bytes
from mlflow_safelock.kinship import KinshipSketch, cosine
from tests.forging.test_from_model import PAIRS
from tests.models import random_lock, tiny_model, tiny_tokenizer


def sampled(model: nn.Module, sketch: KinshipSketch) -> np.ndarray:
    """The model's numbers in the places of a sketch, read plainly."""
    rows = []
    for layer, starts in zip(sketch.layers.tolist(), sketch.offsets.tolist(), strict=True):
        flat = attention_of(model).projections[layer].weight.detach().double().numpy().ravel()
        rows.append([flat[start : start + sketch.values.shape[2]] for start in starts])
    return np.array(rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unit_biases_are_what_the_directions_make_of_the_projection(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    attention = attention_of(model)
    geometry = attention.geometry
    lock = random_lock(geometry, heads=5)
    found = unit_biases_of(attention, lock.heads)
    assert found is not None
    assert found.dtype == np.float32
    assert found.shape == (5, geometry.hidden)
    for bias, locked in zip(found, lock.heads, strict=True):
        projection = attention.projections[locked.layer]
        push = torch.zeros(geometry.heads * geometry.head_dim, dtype=torch.float64)
        start = locked.head * geometry.head_dim
        push[start : start + geometry.head_dim] = torch.from_numpy(locked.direction.astype(np.float64))
        weight = projection.weight.detach().double()
        expected = weight @ push if attention.architecture.layout == "linear" else push @ weight
        np.testing.assert_allclose(bias, expected.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_sketch_is_the_bases_weights_in_the_sampled_places(family: str) -> None:
    model = tiny_model(family)
    sketch = sketch_of(attention_of(model))
    assert sketch is not None
    assert sketch.layers[-1] == attention_of(model).geometry.layers - 1
    assert np.array_equal(sketch.values, sampled(model, sketch).astype(np.float16))


def test_what_is_not_a_plain_matrix_is_not_kept() -> None:
    class Packed(nn.Linear):
        """A weight that may mean anything."""

    model = tiny_model("llama")
    original = model.model.layers[0].self_attn.o_proj
    packed = Packed(original.in_features, original.out_features, bias=False)
    model.model.layers[0].self_attn.o_proj = packed
    lock = random_lock(attention_of(model).geometry, heads=3, seed=1)
    first = [head for head in lock.heads if head.layer == 0] or [lock.heads[0]]
    assert sketch_of(attention_of(model)) is None
    found = unit_biases_of(attention_of(model), first)
    assert (found is None) == (first[0].layer == 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantised_base_gives_a_lock_without_either_and_no_cache(tmp_path: Path) -> None:
    base = quantize_dynamic(tiny_model("llama"), {nn.Linear})
    assert type(attention_of(base).projections[0]) is not nn.Linear
    settings = {"heads": 4, "last_tokens": 2, "base_model": "org/base", "progress": False}
    lock = forge(base, tiny_tokenizer(), PAIRS, **settings)
    assert (lock.sketch, lock.unit_biases) == (None, None)
    assert len(lock.heads) == 4
    assert lock_from_bytes(lock_to_bytes(lock)) == lock
    with pytest.raises(ForgeError, match="packed or offloaded") as info:
        forge(base, tiny_tokenizer(), PAIRS, cache=tmp_path, **settings)
    assert "without a cache" in info.value.next_step


def test_one_projection_that_can_only_be_hooked_costs_the_sketch_and_its_own_heads_biases() -> None:
    class Packed(nn.Linear):
        """A weight that may mean anything."""

    base = tiny_model("llama")
    base.model.layers[1].self_attn.o_proj.__class__ = Packed
    settings = {"last_tokens": 2, "base_model": "org/base", "progress": False}
    for heads in (1, 12):
        lock = forge(base, tiny_tokenizer(), PAIRS, heads=heads, **settings)
        assert lock.sketch is None
        assert (lock.unit_biases is None) == (1 in lock.layers)


def test_a_forged_lock_keeps_both_and_a_file_brings_them_back() -> None:
    base = tiny_model("llama")
    small, large = forge(
        base, tiny_tokenizer(), PAIRS, heads=(2, 4), last_tokens=2, base_model="org/base", progress=False
    )
    for lock in (small, large):
        assert lock.unit_biases is not None
        assert lock.sketch is not None
        assert np.array_equal(lock.unit_biases, unit_biases_of(attention_of(base), lock.heads))
        twin = lock_from_bytes(lock_to_bytes(lock))
        assert twin == lock
        assert twin.sketch is not None
        assert cosine(twin.sketch, sampled(base, twin.sketch)) == pytest.approx(1.0, abs=1e-6)


def test_descendants_are_alike_and_strangers_are_not() -> None:
    """What the sketch is for; toy weights, so the margins are those of a small sample."""
    base = tiny_model("llama", seed=0)
    sketch = sketch_of(attention_of(base))
    assert sketch is not None
    stranger = tiny_model("llama", seed=1)
    child = tiny_model("llama", seed=0)
    with torch.no_grad():
        for parameter in child.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    assert cosine(sketch, sampled(child, sketch)) > 0.98
    assert abs(cosine(sketch, sampled(stranger, sketch))) < 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_biases_of_a_base_follow_from_its_lock_alone(family: str) -> None:
    base = tiny_model(family)
    lock = forge(base, tiny_tokenizer(), PAIRS, heads=6, last_tokens=2, base_model="org/base", progress=False)
    projections = attention_of(base).projections
    before = [None if p.bias is None else p.bias.detach().double().clone() for p in projections]
    with apply_lock(base, lock, 4.5):
        after = {layer: projections[layer].bias.detach().double() for layer in lock.layers}
    found = base_biases(lock, 4.5)
    assert found.keys() == after.keys()
    for layer, bias in found.items():
        pushed = after[layer] if before[layer] is None else after[layer] - before[layer]
        assert torch.allclose(bias, pushed, rtol=1e-4, atol=1e-6)


def test_a_lock_without_unit_biases_says_how_to_get_them() -> None:
    with pytest.raises(ApplyError, match="safelock lock enroll"):
        base_biases(random_lock(attention_of(tiny_model("llama")).geometry), 6.0)


def test_below_an_adapter_the_base_is_known_again() -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_model("llama")
    sketch = sketch_of(attention_of(base))
    assert sketch is not None
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    assert kinship_of(attention_of(adapted), sketch) == pytest.approx(1.0, abs=1e-5)
    assert abs(kinship_of(attention_of(tiny_model("llama", seed=5)), sketch) or 1.0) < 0.2
