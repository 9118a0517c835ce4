"""What a standalone folder costs: directory entries, kilobytes, and bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_safelock.apply import save_locked_checkpoint
from mlflow_safelock.formats import save_lock
from mlflow_safelock.lock import AttentionGeometry
from tests.apply.checkpoint.conftest import load, snapshot
from tests.apply.conftest import logits
from tests.models import random_lock, tiny_model

SCRIPT = """
import re, sys
from mlflow_safelock import load_lock
from mlflow_safelock.apply import save_locked_checkpoint
report = save_locked_checkpoint(sys.argv[1], sys.argv[2], load_lock(sys.argv[3]), verify="structure")
# Not ru_maxrss, which counts the memory of the process that started this one.
status = open("/proc/self/status").read()
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024, report.bytes_written)
"""


@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one file", "sharded"])
def test_files_of_weights_are_shared_and_only_biases_and_small_files_written(shard, save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama", shard=shard)
    report = save_locked_checkpoint(source, tmp_path / "locked", lock)
    small = {name: data for name, data in snapshot(tmp_path / "locked").items() if name not in report.shared}
    assert len(report.shared) == len(list(source.glob("*.safetensors")))
    if "copy" not in report.shared.values():
        assert report.bytes_written == sum(map(len, small.values()))
    for name, how in report.shared.items():
        if how == "hard link":
            original = source / name.replace("model-00001-of-00001", "model" if shard == "1GB" else name[:20])
            assert (tmp_path / "locked" / name).samefile(original)


@pytest.mark.parametrize("sharing", ["link", "copy"])
def test_it_is_told_how_many_bytes_are_there(sharing, save_fine_tune, tmp_path):
    source, lock = save_fine_tune("gpt2", shard="30KB")
    told: list[tuple[str, int, int]] = []
    save_locked_checkpoint(
        source, tmp_path / "locked", lock, sharing=sharing, progress=lambda *how_far: told.append(how_far)
    )
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert told[0] == ("Weights", 0, size)
    assert told[-1] == ("Weights", size, size)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_copy_that_was_asked_for_is_one(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    report = save_locked_checkpoint(source, tmp_path / "locked", lock, sharing="copy")
    assert "hard link" not in report.shared.values()
    assert (source / "model.safetensors").stat().st_nlink == 1


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_file_with_a_tensor_that_changes_is_never_a_hard_link(family, save_fine_tune, tmp_path):
    source, lock = save_fine_tune(family, shard="30KB")
    before = snapshot(source)
    report = save_locked_checkpoint(source, tmp_path / "locked", lock)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    biases = ("attn.c_proj.bias", "attention.dense.bias")
    changed = {
        file
        for name, file in index.items()
        if name.endswith(biases) and any(f".{layer}." in name for layer in lock.layers)
    }
    assert changed
    assert changed < set(report.shared)
    for name, how in report.shared.items():
        assert (how in ("copy", "reflink")) == (name in changed) or how == "reflink"
    assert snapshot(source) == before


def test_saving_the_source_anew_leaves_the_locked_folder_as_it_is(save_fine_tune, tmp_path):
    # save_pretrained writes files anew and does not edit them, so hard links keep what was locked.
    source, lock = save_fine_tune("llama")
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    before, locked = snapshot(tmp_path / "locked"), logits(load(tmp_path / "locked"))
    tiny_model("llama", seed=5).save_pretrained(source)
    assert snapshot(tmp_path / "locked") == before
    assert (logits(load(tmp_path / "locked")) == locked).all()


def test_memory_is_bounded_whatever_the_size(tmp_path):
    shape = AttentionGeometry(layers=3, heads=96, head_dim=128, hidden=12288)  # Mistral-Large's width
    source = tmp_path / "fine-tune"
    size = write_sparse_llama(source, shape, intermediate=28672)
    assert size > 4_000_000_000
    save_lock(random_lock(shape, heads=24), tmp_path / "lock.safetensors")
    command = [sys.executable, "-c", SCRIPT, source, tmp_path / "locked", tmp_path / "lock.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    memory, written = map(int, done.stdout.split())
    assert memory < 500_000_000
    assert written < 2_000_000


def write_sparse_llama(folder: Path, shape: AttentionGeometry, intermediate: int) -> int:
    """A Llama in bfloat16 whose weights are zero, nearly all, and take no room on the disk; their size."""
    hidden, narrow = shape.hidden, 8 * shape.head_dim
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [512, hidden],
        "lm_head.weight": [512, hidden],
    }
    for layer in range(shape.layers):
        path = f"model.layers.{layer}"
        shapes |= {
            f"{path}.self_attn.q_proj.weight": [hidden, hidden],
            f"{path}.self_attn.k_proj.weight": [narrow, hidden],
            f"{path}.self_attn.v_proj.weight": [narrow, hidden],
            f"{path}.self_attn.o_proj.weight": [hidden, hidden],
            f"{path}.mlp.gate_proj.weight": [intermediate, hidden],
            f"{path}.mlp.up_proj.weight": [intermediate, hidden],
            f"{path}.mlp.down_proj.weight": [hidden, intermediate],
            f"{path}.input_layernorm.weight": [hidden],
            f"{path}.post_attention_layernorm.weight": [hidden],
        }
    shapes["model.norm.weight"] = [hidden]
    header, place = {}, 0
    for name, dimensions in shapes.items():
        end = place + 2 * dimensions[0] * (dimensions[1] if len(dimensions) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [place, end]}
        place = end
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + place)
        for name, entry in header.items():
            if name.endswith("o_proj.weight"):
                file.seek(8 + len(written) + entry["data_offsets"][0])
                file.write(b"\x80\x3f" * hidden)  # a row of ones, for a lock that is zero is refused
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 512,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": 8,
        "head_dim": shape.head_dim,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return place
