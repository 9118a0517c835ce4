"""What is promised of locks holds on a GPU, too. Skipped where there is none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, pipeline

from mlflow_safelock import SafetyLock, apply_lock, forge
from mlflow_safelock.apply import attention_of, geometry_from_config
from mlflow_safelock.apply.comparison import compare
from mlflow_safelock.forging import starter_preference_pairs
from tests.models import CHATML, random_lock, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "gpt_oss")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOKENS = torch.tensor([[5, 17, 200, 31, 8, 90, 120, 44], [60, 61, 7, 19, 300, 2, 9, 77]])


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def lock_for(model: PreTrainedModel) -> SafetyLock:
    return random_lock(geometry_from_config(model.config), heads=5)


def on_gpu(family: str, dtype: torch.dtype) -> PreTrainedModel:
    return tiny_model(family).to("cuda", dtype)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    tokens = TOKENS.to("cuda")
    return model(tokens, attention_mask=torch.ones_like(tokens)).logits.float()


def exact_bias(weight: torch.Tensor, lock: SafetyLock, layer: int, alpha: float) -> np.ndarray:
    """``W_o v`` in float64 on the CPU, of a weight ``[hidden, heads * head_dim]``."""
    width = lock.geometry.head_dim
    displacement = np.zeros(lock.geometry.heads * width)
    for head in lock.heads_of_layer(layer):
        displacement[head.head * width : (head.head + 1) * width] = alpha * head.std * head.direction
    return weight.detach().double().cpu().numpy() @ displacement


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_biases_are_the_plain_product_rounded_whatever_products_may_round_to(
    dtype: torch.dtype, precision: str
) -> None:
    model = on_gpu("llama", dtype)
    lock = lock_for(model)
    torch.set_float32_matmul_precision(precision)
    with apply_lock(model, lock, 6.0) as handle:
        handle.verify()
        for layer in handle.layers:
            projection = attention_of(model).projections[layer]
            expected = exact_bias(projection.weight, lock, layer, 6.0)
            error = np.linalg.norm(projection.bias.detach().double().cpu().numpy() - expected)
            assert projection.bias.device.type == "cuda"
            assert error <= 2 * torch.finfo(dtype).eps * np.linalg.norm(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_locked_model_answers_as_on_the_cpu_and_unlocks_to_the_last_bit(family: str) -> None:
    model = on_gpu(family, torch.float32)
    lock = lock_for(model)
    twin = copy.deepcopy(model).cpu()
    before, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    handle = apply_lock(model, lock, 6.0)
    handle.verify()
    locked = logits(model)
    with torch.no_grad(), apply_lock(twin, lock, 6.0):
        expected = twin(TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    assert torch.allclose(locked.cpu(), expected, atol=2e-4, rtol=1e-3)
    assert (locked - before).abs().max() > 20 * (locked.cpu() - expected).abs().max()
    handle.remove()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_layers_on_gpu_and_cpu_are_locked_together() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    lock = random_lock(geometry_from_config(model.config), heads=10)
    assert set(lock.layers) == {0, 1, 2}
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": 0}
    places |= {"model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    whole = copy.deepcopy(model).to("cuda")
    spread = accelerate.dispatch_model(model, places)
    with apply_lock(whole, lock, 6.0), apply_lock(spread, lock, 6.0) as handle:
        handle.verify()
        assert torch.allclose(logits(spread), logits(whole), atol=1e-4)


def test_a_compiled_model_is_locked_and_unlocked() -> None:
    model = on_gpu("llama", torch.float32)
    compiled = torch.compile(model)
    before = logits(compiled)
    with apply_lock(model, lock_for(model), 6.0):
        locked, eager = logits(compiled), logits(model)
    assert torch.allclose(locked, eager, atol=1e-3)
    assert (locked - before).abs().max() > 1e-2
    assert torch.allclose(logits(compiled), before, atol=1e-5)


def test_a_model_saved_from_a_gpu_reloads_locked(tmp_path: Path) -> None:
    model = on_gpu("llama", torch.float32)
    before = logits(model)
    with apply_lock(model, lock_for(model), 6.0):
        locked, state = logits(model), model.state_dict()
        model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).to("cuda")
    assert all(torch.equal(reloaded.state_dict()[name], value) for name, value in state.items())
    assert torch.allclose(logits(reloaded), locked, atol=1e-4)
    assert (locked - before).abs().max() > 1e-2


def test_a_lock_forged_on_a_gpu_is_the_one_forged_on_the_cpu() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(CHATML)
    pairs = starter_preference_pairs()[:40]
    settings = {"heads": 4, "last_tokens": 3, "base_model": "tiny/base", "progress": False}
    on_cpu = forge(model, tokenizer, pairs, **settings)
    found = forge(model.to("cuda"), tokenizer, pairs, **settings)
    assert [(head.layer, head.head) for head in found.heads] == [
        (head.layer, head.head) for head in on_cpu.heads
    ]
    for ours, theirs in zip(found.heads, on_cpu.heads, strict=True):
        assert np.dot(ours.direction, theirs.direction) > 0.9999
        assert ours.std == pytest.approx(theirs.std, rel=1e-3)


def test_before_and_after_are_compared() -> None:
    model, tokenizer = on_gpu("llama", torch.bfloat16), tiny_tokenizer(CHATML)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = compare(model, tokenizer, ["how do i bake the bread today?"], lock_for(model), max_new_tokens=8)
    assert len(found) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pyfunc_serves_an_overlay_locked_on_the_gpu(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    from mlflow_safelock.flavors import locked_model

    model, tokenizer = tiny_model("llama"), tiny_tokenizer(CHATML)
    lock = lock_for(model)
    made = pipeline("text-generation", model=model.cpu(), tokenizer=tokenizer, device="cpu")
    mlflow.transformers.save_model(made, tmp_path / "source", pip_requirements=[])
    locked_model.save_model(lock, tmp_path / "locked", str(tmp_path / "source"), alpha=4.0)
    served = mlflow.pyfunc.load_model(str(tmp_path / "locked"), model_config={"device": 0})
    found = served.get_raw_model().model
    assert {parameter.device.type for parameter in found.parameters()} == {"cuda"}
    unlocked = copy.deepcopy(model).to("cuda")
    with apply_lock(unlocked, lock, 4.0):
        expected = logits(unlocked)
    assert torch.allclose(logits(found), expected, atol=1e-4)
    assert (logits(unlocked) - expected).abs().max() > 1e-2
    assert served.predict(["how do i bake the bread today?"])
