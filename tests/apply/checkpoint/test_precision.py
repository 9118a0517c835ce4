"""A stored bias is within half a step of its dtype of the exact one, whatever the shape of the attention."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mlflow_safelock.apply import save_locked_checkpoint
from mlflow_safelock.apply.checkpoint.biases import biases_of
from mlflow_safelock.apply.checkpoint.source import read_source
from mlflow_safelock.lock import AttentionGeometry
from tests.apply.test_displacement import plain_biases
from tests.models import random_lock

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_attention(folder: Path, shape: AttentionGeometry, dtype: str, weights: torch.Tensor) -> None:
    """A Llama's configuration and the weights of its attention, of which there is nothing else."""
    values = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": 1,
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden,
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(values))
    tensors = {}
    for layer, weight in enumerate(weights):
        path = f"model.layers.{layer}.self_attn"
        tensors[f"{path}.o_proj.weight"] = weight.clone()
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{path}.{name}.weight"] = torch.zeros(shape.head_dim, shape.hidden, dtype=weight.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 9),
    head_dim=st.sampled_from([2, 6, 8, 40, 128]),
    width=st.sampled_from([2, 12, 50, 128]),
    dtype=st.sampled_from(sorted(DTYPES)),
    alpha=st.floats(0.01, 50).flatmap(lambda value: st.sampled_from([value, -value])),
    seed=st.integers(0, 2**16),
)
def test_the_error_of_a_bias_is_the_rounding_of_its_dtype(layers, heads, head_dim, width, dtype, alpha, seed):
    hidden = heads * width
    shape = AttentionGeometry(layers=layers, heads=heads, head_dim=head_dim, hidden=hidden)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(layers, hidden, heads * head_dim, generator=generator).to(DTYPES[dtype])
    lock = random_lock(shape, heads=min(5, layers * heads), seed=seed)
    with tempfile.TemporaryDirectory() as name:
        write_attention(Path(name), shape, dtype, weights)
        biases = biases_of(read_source(Path(name)), lock, alpha)
    limits = torch.finfo(DTYPES[dtype])
    exact = torch.from_numpy(plain_biases(lock, alpha, weights.double().numpy()))
    for layer in lock.layers:
        found = biases.added[f"model.layers.{layer}.self_attn.o_proj.bias"]
        assert found.dtype == DTYPES[dtype]
        # Float64's own sums, and numbers too small for the dtype to hold with all its digits.
        beyond = 1e-12 * exact[layer].abs().max() + limits.smallest_normal * limits.eps
        allowed = limits.eps / 2 * exact[layer].abs() + beyond
        assert ((found.double() - exact[layer]).abs() <= allowed).all()
    assert biases.error <= limits.eps / 2


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 2**-12), (torch.float16, 2**-15)], ids=str)
def test_the_report_tells_what_rounding_costs(dtype, least, save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama", dtype=dtype)
    report = save_locked_checkpoint(source, tmp_path / "locked", lock)
    assert least < report.bias_error <= torch.finfo(dtype).eps / 2
