"""Weights of eight bits with block scales."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mlflow_safelock.apply import ARCHITECTURES, apply_lock, save_locked_checkpoint
from mlflow_safelock.apply.checkpoint import unlock_checkpoint
from mlflow_safelock.apply.checkpoint.biases import biases_of
from mlflow_safelock.apply.checkpoint.fp8 import scheme_of
from mlflow_safelock.apply.checkpoint.source import read_source
from mlflow_safelock.errors import CheckpointError
from mlflow_safelock.lock import AttentionGeometry
from tests.apply.checkpoint.conftest import beside, load, snapshot
from tests.apply.checkpoint.test_precision import DTYPES, write_attention
from tests.apply.conftest import logits
from tests.apply.test_displacement import plain_biases
from tests.models import random_lock

WEIGHTS = "model.safetensors"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantised(
    weight: torch.Tensor, block: list[int] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight in float8_e4m3fn, its scales, and what the two stand for, in float64, block by block."""
    rows, columns = weight.shape
    high, wide = block or (rows, columns)
    stored, plain = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight).double()
    scales = torch.empty(-(-rows // high), -(-columns // wide))
    for i in range(0, rows, high):
        for j in range(0, columns, wide):
            place = slice(i, i + high), slice(j, j + wide)
            scale = weight[place].abs().max().float() / 448
            stored[place] = (weight[place].float() / scale).to(torch.float8_e4m3fn)
            scales[i // high, j // wide] = scale
            plain[place] = stored[place].float().double() * scale.double()
    return stored, scales if block else scales[0, 0], plain


@pytest.fixture
def save_quantised(save_fine_tune):
    """Saves a tiny fine-tune with weights of eight bits; gives folder, lock, and the plain weights."""

    def save(family: str = "qwen3", block: list[int] | None = None, **quantization: object):
        source, lock = save_fine_tune(family, dtype=torch.bfloat16)
        tensors, plain = load_file(source / WEIGHTS), {}
        for name, tensor in list(tensors.items()):
            if any(f"{projection}.weight" in name for projection in PROJECTIONS):
                stored, scales, plain[name] = quantised(tensor, block)
                tensors |= {name: stored, name.replace(".weight", ".weight_scale_inv"): scales}
        save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
        change_config(source, quantization_config={**FP8, "weight_block_size": block, **quantization})
        return source, lock, plain

    return save


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, **values: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), **values}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("block", [[16, 16], [8, 32], [7, 5], [128, 128], None], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
def test_biases_are_those_of_the_weights_that_blocks_and_scales_stand_for(family, block, save_quantised):
    source, lock, plain = save_quantised(family, block)
    row = ARCHITECTURES[family]
    names = [f"{row.layers}.{layer}.{row.output_projection}" for layer in range(3)]
    weights = torch.stack([plain[f"{name}.weight"] for name in names])
    expected = plain_biases(lock, 6.0, weights.numpy())
    biases = biases_of(read_source(source), lock, 6.0)
    for layer in lock.layers:
        bias, exact = biases.added[f"{names[layer]}.bias"], torch.tensor(expected[layer])
        assert bias.dtype == torch.bfloat16
        half_a_step = torch.finfo(torch.bfloat16).eps / 2 * exact.abs()
        assert ((bias.double() - exact).abs() <= half_a_step * (1 + 1e-6)).all()
    assert 0 < biases.error <= torch.finfo(torch.bfloat16).eps / 2


@hypothesis.settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 7),
    head_dim=st.sampled_from([2, 6, 8, 40, 64]),
    width=st.sampled_from([2, 12, 50, 64]),
    block=st.one_of(st.none(), st.tuples(st.integers(1, 200), st.integers(1, 200)).map(list)),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    alpha=st.floats(0.01, 20).flatmap(lambda value: st.sampled_from([value, -value])),
    seed=st.integers(0, 2**16),
)
def test_the_error_of_a_bias_is_the_rounding_of_its_dtype(
    layers, heads, head_dim, width, block, dtype, alpha, seed
):
    shape = AttentionGeometry(layers=layers, heads=heads, head_dim=head_dim, hidden=heads * width)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(layers, shape.hidden, heads * head_dim, generator=generator)
    lock = random_lock(shape, heads=min(5, layers * heads), seed=seed)
    parts = [quantised(weight, block) for weight in weights]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_attention(folder, shape, dtype, weights.to(DTYPES[dtype]))
        change_config(folder, quantization_config={**FP8, "weight_block_size": block})
        for layer, (stored, scales, _) in enumerate(parts):
            path = f"model.layers.{layer}.self_attn.o_proj"
            change_tensors(folder, **{f"{path}.weight": stored, f"{path}.weight_scale_inv": scales})
        biases = biases_of(read_source(folder), lock, alpha)
    exact = torch.from_numpy(plain_biases(lock, alpha, torch.stack([plain for _, _, plain in parts]).numpy()))
    limits = torch.finfo(DTYPES[dtype])
    for layer in lock.layers:
        found = biases.added[f"model.layers.{layer}.self_attn.o_proj.bias"]
        assert found.dtype == DTYPES[dtype]
        # Float64's own sums, and numbers too small for the dtype to hold with all its digits.
        beyond = 1e-12 * exact[layer].abs().max() + limits.smallest_normal * limits.eps
        assert ((found.double() - exact[layer]).abs() <= limits.eps / 2 * exact[layer].abs() + beyond).all()
    assert biases.error <= limits.eps / 2


@pytest.mark.parametrize("verify", ["reload", "structure"])
def test_stock_transformers_reloads_it_locked(verify, save_quantised, tmp_path):
    source, lock, _ = save_quantised("qwen3", [16, 16])
    before, unlocked = snapshot(source), logits(load(source))
    report = save_locked_checkpoint(source, tmp_path / "locked", lock, 2.0, verify=verify)
    assert report.verified == verify
    in_memory = load(source)
    apply_lock(in_memory, lock, 2.0)
    found, expected = logits(load(tmp_path / "locked")), logits(in_memory)
    assert (found - expected).abs().max() < 0.2 * (expected - unlocked).abs().max()
    unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    assert snapshot(tmp_path / "unlocked") == before


def test_an_output_projection_that_was_not_quantised_is_read_as_it_is(save_quantised):
    source, lock, plain = save_quantised("qwen3", [16, 16])
    names = [name for name in plain if "o_proj" in name]
    scales = {name.replace(".weight", ".weight_scale_inv"): None for name in names}
    change_tensors(source, **{name: plain[name].bfloat16() for name in names}, **scales)
    biases = biases_of(read_source(source), lock, 6.0)
    layer = lock.layers[0]
    weights = torch.stack([plain[f"model.layers.{index}.self_attn.o_proj.weight"] for index in range(3)])
    exact = torch.tensor(plain_biases(lock, 6.0, weights.bfloat16().double().numpy())[layer])
    found = biases.added[f"model.layers.{layer}.self_attn.o_proj.bias"].double()
    assert torch.allclose(found, exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors"},
        {**FP8, "scale_fmt": "ue8m0"},
        {**FP8, "fmt": "e5m2"},
        {**FP8, "weight_block_size": [128]},
        {**FP8, "weight_block_size": [0, 128]},
        {**FP8, "weight_block_size": "128"},
        "fp8",
    ],
    ids=str,
)
def test_schemes_that_are_not_known_are_refused(quantization, save_quantised):
    source, lock, _ = save_quantised("qwen3", [16, 16])
    change_config(source, quantization_config=quantization)
    assert scheme_of(quantization) is None
    refused(source, lock, "quantised weights other than.*before it is quantised")


def test_missing_or_other_scales_are_refused(save_quantised):
    source, lock, _ = save_quantised("qwen3", [16, 16])
    layer = lock.layers[0]
    name = f"model.layers.{layer}.self_attn.o_proj.weight_scale_inv"
    change_tensors(source, **{name: torch.ones(3, 3)})
    refused(source, lock, rf"{name}.* shape \(3, 3\).*\(3, 2\)")
    change_tensors(source, **{name: None})
    refused(source, lock, f"without scales at {name}")


def refused(source: Path, lock, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_locked_checkpoint(source, source.parent / "locked", lock)
    assert beside(source) == {"fine-tune"}
