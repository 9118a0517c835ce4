from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from mlflow_safelock.apply import (
    ARCHITECTURES,
    apply_lock,
    attention_of,
    geometry_from_config,
    save_locked_checkpoint,
)
from mlflow_safelock.errors import (
    AlphaError,
    AlreadyLockedError,
    CheckpointError,
    LockMismatchError,
    UnsupportedArchitectureError,
)
from mlflow_safelock.lock import AttentionGeometry
from tests.apply.checkpoint.conftest import beside, load, snapshot
from tests.apply.conftest import TOKENS, logits
from tests.models import random_lock, tiny_model

STANDALONE = sorted(family for family, row in ARCHITECTURES.items() if row.standalone)
MEMORY_ONLY = sorted(set(ARCHITECTURES) - set(STANDALONE))


@pytest.mark.parametrize("family", STANDALONE)
def test_stock_transformers_reloads_the_folder_with_the_logits_of_the_model_locked_in_memory(
    family, save_fine_tune, tmp_path
):
    source, lock = save_fine_tune(family)
    before, unlocked = snapshot(source), logits(load(source))
    in_memory = load(source)
    apply_lock(in_memory, lock, 2.0)

    report = save_locked_checkpoint(source, tmp_path / "locked", lock, 2.0)

    found = logits(load(tmp_path / "locked"))
    assert torch.allclose(found, logits(in_memory), atol=1e-5)
    assert (found - unlocked).abs().max() > 0.02
    assert snapshot(source) == before
    assert report.max_logit_difference <= 1e-5
    assert report.max_logit_change > 0.02
    assert set(report.files) == set(snapshot(tmp_path / "locked"))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_checkpoints_reload_as_the_model_locked_in_memory(
    family, dtype, save_fine_tune, tmp_path
):
    source, lock = save_fine_tune(family, dtype=dtype, shard="20KB")
    in_memory = load(source)
    apply_lock(in_memory, lock)
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    reloaded = load(tmp_path / "locked")
    assert reloaded.dtype == dtype
    expected = logits(in_memory)
    # Biases are summed in float64 on the disk and in float32 in memory: a number may round the other way.
    allowed = 2 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert float((logits(reloaded) - expected).abs().max()) <= allowed


def test_a_process_without_this_package_loads_it_locked(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("mistral", shard="20KB")
    folder = tmp_path / "locked"
    save_locked_checkpoint(source, folder, lock)
    in_memory = load(source)
    apply_lock(in_memory, lock)
    script = f"""
import sys
sys.modules["mlflow_safelock"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokens = torch.tensor({TOKENS.tolist()})
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(tokens, attention_mask=torch.ones_like(tokens)).logits
assert AutoTokenizer.from_pretrained(sys.argv[1]).chat_template
torch.save(logits, sys.argv[2])
"""
    result = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", script, str(folder), str(result)], check=True, cwd=tmp_path)
    assert torch.allclose(torch.load(result), logits(in_memory), atol=1e-5)
    assert not torch.allclose(torch.load(result), logits(load(source)), atol=1e-2)


@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one file", "sharded"])
def test_files_of_weights_stay_byte_for_byte_and_one_file_holds_what_was_added(
    shard, save_fine_tune, tmp_path
):
    source, lock = save_fine_tune("llama", shard=shard)
    folder = tmp_path / "locked"
    save_locked_checkpoint(source, folder, lock)
    weights = {path.name: path.read_bytes() for path in source.glob("*.safetensors")}
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert (len(weights) > 2) == (shard == "20KB")
    added = load_file(folder / "model-safelock.safetensors")
    assert sorted(
        content for name, content in found.items() if name != "model-safelock.safetensors"
    ) == sorted(weights.values())
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert set(added) == {f"model.layers.{n}.self_attn.{name}.bias" for n in range(3) for name in projections}
    pushed = {name for name, bias in added.items() if bias.any()}
    assert pushed == {f"model.layers.{layer}.self_attn.o_proj.bias" for layer in lock.layers}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    everything = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == everything
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values()
    )
    assert not (folder / "model.safetensors").exists()


def test_nothing_of_the_copy_changes_when_the_source_is_edited_later(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    save_locked_checkpoint(source, tmp_path / "locked", lock, sharing="copy")
    before = snapshot(tmp_path / "locked")
    for path in source.iterdir():
        with path.open("r+b") as file:
            file.write(b"overwritten in place")
    assert snapshot(tmp_path / "locked") == before


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_bias_that_is_there_is_added_to_in_the_copy_and_no_file_is_added(family, save_fine_tune, tmp_path):
    config = {"attention_bias": True} if family == "llama" else {}
    source, lock = save_fine_tune(family, **config)
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "locked" / "model.safetensors")
    row = ARCHITECTURES[family]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(after) == set(before)
    assert changed == {f"{row.layers}.{layer}.{row.output_projection}.bias" for layer in lock.layers}


def test_everything_a_consumer_needs_is_carried_and_the_rest_is_reported(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    (source / "LICENSE").write_text("Apache")
    (source / "training_args.bin").write_bytes(b"pickle")
    (source / "trainer_state.json").write_text("{}")
    (source / "consolidated.safetensors").write_bytes(b"")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_bytes(b"")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    report = save_locked_checkpoint(source, tmp_path / "locked", lock)
    carried, original = snapshot(tmp_path / "locked"), snapshot(source)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
        "additional_chat_templates/rag.jinja",
    ):
        assert carried[name] == original[name]
    left_out = ("consolidated.safetensors", "onnx/", "pytorch_model.bin.index.json", "trainer_state.json")
    assert report.left_out == (*left_out, "training_args.bin")
    assert set(report.left_out).isdisjoint(carried)
    assert GenerationConfig.from_pretrained(tmp_path / "locked").top_k == 7


def test_configuration_and_card_say_which_lock_at_which_alpha(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    report = save_locked_checkpoint(source, tmp_path / "locked", lock, -3.5)
    entry = {"lock": lock.digest, "base_model": lock.base_model, "alpha": -3.5}
    assert AutoConfig.from_pretrained(tmp_path / "locked").safelock == entry
    card = (tmp_path / "locked" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n---\n# Support bot")
    assert lock.digest in card
    assert "| alpha | -3.5 |" in card
    assert (report.lock, report.alpha, report.biases) == (lock.digest, -3.5, len(lock.layers))


def test_a_negative_alpha_is_the_opposite_push(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    save_locked_checkpoint(source, tmp_path / "plus", lock, 3.0)
    save_locked_checkpoint(source, tmp_path / "minus", lock, -3.0)
    plus, minus = (load_file(tmp_path / name / "model-safelock.safetensors") for name in ("plus", "minus"))
    assert all(torch.equal(bias, -minus[name]) for name, bias in plus.items())


def test_a_locked_folder_is_recognised_and_not_locked_again(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("qwen2")
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    with pytest.raises(AlreadyLockedError, match=lock.digest):
        save_locked_checkpoint(tmp_path / "locked", tmp_path / "twice", lock)
    with pytest.raises(AlreadyLockedError, match=lock.digest):
        apply_lock(load(tmp_path / "locked"), lock)
    config = json.loads((tmp_path / "locked" / "config.json").read_text())
    del config["safelock"]
    (tmp_path / "locked" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AlreadyLockedError, match=r"model-safelock\.safetensors"):
        save_locked_checkpoint(tmp_path / "locked", tmp_path / "twice", lock)
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("family", MEMORY_ONLY)
def test_a_family_without_a_place_for_biases_is_refused_with_those_that_have_one(
    family, save_fine_tune, tmp_path
):
    source, lock = save_fine_tune(family)
    with pytest.raises(UnsupportedArchitectureError, match=rf"'{family}'.*llama.*mistral.*apply_lock"):
        save_locked_checkpoint(source, tmp_path / "locked", lock)
    assert beside(source) == {"fine-tune"}


@pytest.mark.parametrize("family", MEMORY_ONLY)
def test_no_flag_gives_the_output_projection_of_such_a_family_a_bias(family):
    # GLM's attention_bias is accepted, and gives q, k and v a bias only.
    stock = AutoConfig.for_model(family).to_dict()
    flags = {name: True for name, value in stock.items() if "bias" in name and type(value) is bool}
    flags |= {"attention_bias": True, "bias": True, "use_bias": True, "enable_bias": True}
    flags |= {"no_bias": False} if "no_bias" in stock else {}
    projections = attention_of(tiny_model(family, **flags)).projections
    assert all(projection.bias is None for projection in projections)


def test_a_deepseek_without_latent_queries_has_one_bias_less(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("deepseek_v3", q_lora_rank=None)
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    added = set(load_file(tmp_path / "locked" / "model-safelock.safetensors"))
    assert added == {
        f"model.layers.{layer}.self_attn.{name}.bias"
        for layer in range(3)
        for name in ("o_proj", "kv_a_proj_with_mqa")
    }


def test_what_cannot_be_used_is_refused_before_anything_is_written(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    shape = geometry_from_config(load(source).config)
    other = random_lock(AttentionGeometry(**{**shape.model_dump(), "layers": 4}))
    with pytest.raises(LockMismatchError, match="4 layers"):
        save_locked_checkpoint(source, tmp_path / "locked", other)
    for alpha in (0.0, float("nan"), "6"):
        with pytest.raises(AlphaError):
            save_locked_checkpoint(source, tmp_path / "locked", lock, alpha)
    with pytest.raises(AlphaError, match="can hold"):
        save_locked_checkpoint(source, tmp_path / "locked", lock, 1e300)
    with pytest.raises(CheckpointError, match="no folder"):
        save_locked_checkpoint(tmp_path / "nowhere", tmp_path / "locked", lock)
    with pytest.raises(CheckpointError, match="lies in the source"):
        save_locked_checkpoint(source, source / "locked", lock)
    with pytest.raises(CheckpointError, match="Create it first"):
        save_locked_checkpoint(source, tmp_path / "no" / "parent", lock)
    assert beside(source) == {"fine-tune"}


def test_an_existing_destination_is_left_alone(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "precious").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("locked", "dangling"):
        with pytest.raises(CheckpointError, match="exists already"):
            save_locked_checkpoint(source, tmp_path / name, lock)
    assert snapshot(tmp_path / "locked") == {"precious": b"x"}
    assert beside(source) == {"fine-tune", "locked", "dangling"}


def test_a_checkpoint_that_does_not_reload_as_it_should_is_not_left_behind(save_fine_tune, tmp_path):
    # Whole by its headers, but transformers cannot build a model of it: one tensor is of another shape.
    source, lock = save_fine_tune("llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 65}))
    with pytest.raises(CheckpointError, match="cannot load"):
        save_locked_checkpoint(source, tmp_path / "locked", lock)
    assert beside(source) == {"fine-tune"}


def test_a_disk_that_refuses_to_go_on_leaves_nothing_behind(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the weights are larger
    try:
        with pytest.raises(CheckpointError, match=r"could not be written.*too large"):
            save_locked_checkpoint(source, tmp_path / "locked", lock, sharing="copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert beside(source) == {"fine-tune"}


def test_other_users_may_read_the_folder_as_the_umask_says(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    before = os.umask(0o022)
    try:
        save_locked_checkpoint(source, tmp_path / "locked", lock, sharing="copy")
    finally:
        os.umask(before)
    assert (tmp_path / "locked").stat().st_mode & 0o777 == 0o755
    assert all(Path(path).stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "locked").iterdir())


def test_paths_may_be_strings_and_weights_symlinks_as_in_a_hub_cache(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    (tmp_path / "blob").write_bytes((source / "model.safetensors").read_bytes())
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(tmp_path / "blob")
    save_locked_checkpoint(str(source), str(tmp_path / "locked"), lock)
    assert not any(path.is_symlink() for path in (tmp_path / "locked").iterdir())
    assert AutoTokenizer.from_pretrained(tmp_path / "locked").chat_template


@pytest.mark.parametrize(
    ("family", "dtype", "alpha"), [("llama", torch.float32, 1e-320), ("qwen2", torch.float16, 1e-8)]
)
def test_an_alpha_of_which_nothing_is_left_makes_no_folder(family, dtype, alpha, save_fine_tune, tmp_path):
    source, lock = save_fine_tune(family, dtype=dtype)
    with pytest.raises(AlphaError):
        save_locked_checkpoint(source, tmp_path / "locked", lock, alpha)
    assert beside(source) == {"fine-tune"}
