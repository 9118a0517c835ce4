"""What vLLM and its like read: exact names of tensors, and the flag that makes them look for them."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from mlflow_safelock.apply import save_locked_checkpoint


@pytest.mark.parametrize(
    ("family", "form"),
    [("llama", "LlamaForCausalLM"), ("mistral", "LlamaForCausalLM"), ("ministral", "SmolLM3ForCausalLM")],
)
@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one file", "sharded"])
def test_biases_are_there_under_the_names_that_vllm_reads(family, form, shard, save_fine_tune, tmp_path):
    source, lock = save_fine_tune(family, shard=shard)
    folder = tmp_path / "locked"
    save_locked_checkpoint(source, folder, lock)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [form]
    assert config["model_type"] == form.removesuffix("ForCausalLM").lower()
    assert config["attention_bias"] is True
    with safe_open(folder / "model-safelock.safetensors", framework="pt") as file:
        biases = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    heads, shared, width = 4, 2, 8
    sizes = {"q_proj": heads * width, "k_proj": shared * width, "v_proj": shared * width, "o_proj": 48}
    assert {name: tuple(bias.shape) for name, bias in biases.items()} == {
        f"model.layers.{layer}.self_attn.{projection}.bias": (size,)
        for layer in range(3)
        for projection, size in sizes.items()
    }
    for name, bias in biases.items():
        layer = int(name.split(".")[2])
        assert bool(bias.any()) == ("o_proj" in name and layer in lock.layers)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name for name, file in index.items() if file == "model-safelock.safetensors"} == set(biases)
    # vLLM reads every file that the index names, and no other: nothing may be there twice.
    names = [name for file in set(index.values()) for name in names_in(folder / file)]
    assert sorted(names) == sorted(index)


def names_in(path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
