from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlflow_safelock.apply import ARCHITECTURES
from mlflow_safelock.apply.checkpoint.biases import biases_of
from mlflow_safelock.apply.checkpoint.source import read_source
from tests.apply.test_displacement import plain_biases

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_stored_biases_are_the_plain_product_rounded_once(family, dtype, save_fine_tune):
    folder, lock = save_fine_tune(family, dtype=dtype)
    row, tensors = ARCHITECTURES[family], load_file(folder / WEIGHTS)
    names = [f"{row.layers}.{layer}.{row.output_projection}" for layer in range(3)]
    weights = torch.stack([tensors[f"{name}.weight"] for name in names]).double()
    weights = weights if row.layout == "linear" else weights.transpose(1, 2)
    expected = plain_biases(lock, 6.0, weights.numpy())
    biases = biases_of(read_source(folder), lock, 6.0)
    found = {**biases.added, **biases.replaced}
    for layer in lock.layers:
        before = tensors.get(f"{names[layer]}.bias", torch.zeros(1))
        exact = torch.tensor(expected[layer]) + before.double()
        bias = found[f"{names[layer]}.bias"]
        assert bias.dtype == dtype
        half_a_step = torch.finfo(dtype).eps / 2 * exact.abs()
        assert ((bias.double() - exact).abs() <= half_a_step * (1 + 1e-6)).all()


def test_only_the_locked_columns_are_read(save_fine_tune):
    folder, lock = save_fine_tune("llama")
    tensors = load_file(folder / WEIGHTS)
    before = biases_of(read_source(folder), lock, 6.0)
    locked = {(item.layer, item.head) for item in lock.heads}
    for layer in range(3):
        for head in range(4):
            if (layer, head) not in locked:
                name = f"model.layers.{layer}.self_attn.o_proj.weight"
                tensors[name][:, head * 8 : head * 8 + 8] = torch.nan
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    after = biases_of(read_source(folder), lock, 6.0)
    assert all(torch.equal(bias, after.added[name]) for name, bias in before.added.items())
