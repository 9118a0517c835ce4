from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlflow_safelock.apply import ARCHITECTURES, apply_lock, save_locked_checkpoint
from mlflow_safelock.apply.checkpoint import confirmation
from mlflow_safelock.apply.checkpoint.biases import biases_of
from mlflow_safelock.apply.checkpoint.source import read_source
from mlflow_safelock.apply.checkpoint.structure import confirm_by_structure
from mlflow_safelock.apply.checkpoint.writing import WrittenFile
from mlflow_safelock.errors import CheckpointError
from tests.apply.checkpoint.conftest import beside, load
from tests.apply.conftest import logits

STANDALONE = sorted(family for family, row in ARCHITECTURES.items() if row.standalone)
BIASES = "model-safelock.safetensors"
WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize("family", STANDALONE)
def test_what_is_confirmed_without_loading_loads_locked(family, save_fine_tune, tmp_path):
    source, lock = save_fine_tune(family)
    report = save_locked_checkpoint(source, tmp_path / "locked", lock, 2.0, verify="structure")
    assert report.verified == "structure"
    assert report.check.startswith("structure, not loaded")
    assert report.max_logit_difference is report.max_logit_change is None
    in_memory = load(source)
    apply_lock(in_memory, lock, 2.0)
    assert torch.allclose(logits(load(tmp_path / "locked")), logits(in_memory), atol=1e-5)


def test_it_is_told_apart_what_was_compared_and_what_is_the_same_file(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("gpt2", shard="30KB")
    report = save_locked_checkpoint(source, tmp_path / "linked", lock, verify="structure")
    ways = list(report.shared.values())
    linked, own = ways.count("hard link"), len(ways) - ways.count("hard link")
    if linked:
        assert own
        assert f"{linked} files of weights are the source's own (hard links), {own} compared" in report.check
    report = save_locked_checkpoint(source, tmp_path / "own", lock, verify="structure", sharing="copy")
    assert "files of weights compared byte for byte with the source's; biases" in report.check


@pytest.mark.parametrize(("free", "kind"), [(5.1, "reload"), (4.9, "structure")])
def test_weights_of_eight_bits_take_twice_their_bytes_in_memory(
    save_fine_tune, tmp_path, monkeypatch, free, kind
):
    folder, _ = save_fine_tune("llama")
    source = dataclasses.replace(read_source(folder), fp8=object())
    available = int(source.weights.size * free / 1024) + 1
    monkeypatch.setattr(confirmation, "_MEMORY", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text(f"MemAvailable: {available} kB\n")
    assert confirmation._fits(source) == (kind == "reload")


def test_a_model_is_loaded_if_it_fits_and_the_report_says_so(save_fine_tune, tmp_path, monkeypatch):
    source, lock = save_fine_tune("llama")
    assert save_locked_checkpoint(source, tmp_path / "fits", lock).verified == "reload"
    monkeypatch.setattr(confirmation, "RELOAD_LIMIT", 1000)
    assert save_locked_checkpoint(source, tmp_path / "too-big", lock).verified == "structure"
    assert save_locked_checkpoint(source, tmp_path / "asked", lock, verify="reload").verified == "reload"


def test_a_model_for_which_there_is_no_memory_is_not_loaded(save_fine_tune, tmp_path, monkeypatch):
    source, lock = save_fine_tune("llama")
    (tmp_path / "meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable:     200 kB\n")
    monkeypatch.setattr(confirmation, "_MEMORY", tmp_path / "meminfo")
    assert save_locked_checkpoint(source, tmp_path / "locked", lock).verified == "structure"


def test_a_check_that_there_is_not_is_refused(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    with pytest.raises(CheckpointError, match=r"verify is 'hope'.*auto, reload, structure"):
        save_locked_checkpoint(source, tmp_path / "locked", lock, verify="hope")
    assert beside(source) == {"fine-tune"}


@pytest.fixture
def checked(save_fine_tune, tmp_path):
    """A sound locked checkpoint in files of its own, and the check of it."""
    source, lock = save_fine_tune("llama")
    locked = tmp_path / "locked"
    save_locked_checkpoint(source, locked, lock, sharing="copy")
    files = [WrittenFile("model.safetensors", WEIGHTS, "copy", ())]
    read = read_source(source)
    biases = biases_of(read, lock, 6.0)
    return locked, lambda: confirm_by_structure(read, files, biases, locked)


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_sound_checkpoint_is_confirmed(checked):
    assert checked[1]().kind == "structure"


@pytest.mark.parametrize("place", [0.2, 0.5, 0.999])
def test_a_single_changed_bit_is_found(checked, place):
    locked, confirm = checked
    content = bytearray((locked / WEIGHTS).read_bytes())
    content[int(len(content) * place)] ^= 1
    (locked / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is not what"):
        confirm()


def test_biases_other_than_those_computed_are_found(checked):
    locked, confirm = checked
    biases = load_file(locked / BIASES)
    name = next(name for name, bias in biases.items() if bias.any())
    save_file({**biases, name: -biases[name]}, locked / BIASES)
    with pytest.raises(CheckpointError, match=f"{name} is stored with other numbers"):
        confirm()
    save_file({**biases, "model.ghost.bias": biases[name].clone()}, locked / BIASES)
    with pytest.raises(CheckpointError, match="does not hold the biases that it should"):
        confirm()


def test_an_index_that_tells_another_size_or_place_is_found(checked):
    locked, confirm = checked
    path = locked / "model.safetensors.index.json"
    sound = json.loads(path.read_text())
    change_json(path, metadata={"total_size": sound["metadata"]["total_size"] + 1})
    with pytest.raises(CheckpointError, match=r"says .* bytes, and it is"):
        confirm()
    places = dict(sound["weight_map"])
    del places["model.norm.weight"]
    path.write_text(json.dumps({**sound, "weight_map": places}))
    with pytest.raises(CheckpointError, match="which file it is in"):
        confirm()


def test_a_configuration_by_which_transformers_drops_the_biases_is_found(checked):
    locked, confirm = checked
    change_json(locked / "config.json", attention_bias=False)
    with pytest.raises(CheckpointError, match=r"without a place for model\.layers\.0.*drop the lock"):
        confirm()


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_a_family_that_accepts_the_flag_and_drops_the_bias_is_found(family, checked):
    # GLM gives q, k and v a bias by the flag, and the output projection none.
    locked, confirm = checked
    change_json(locked / "config.json", model_type=family, architectures=None, pad_token_id=0)
    with pytest.raises(CheckpointError, match=r"without a place for .*o_proj\.bias"):
        confirm()


def test_a_copy_of_another_model_is_found(checked, save_fine_tune):
    locked, confirm = checked
    other, _ = save_fine_tune("llama", seed=1)
    shutil.copy(locked / WEIGHTS, locked / "own")
    shutil.copy(other / "model.safetensors", locked / WEIGHTS)
    shutil.move(locked / "own", other / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not what"):
        confirm()


# Why a tensor that changes is changed in a copy of its file, and not put into another file beside it.
@pytest.mark.parametrize(("file", "wins"), [("model-safelock.safetensors", True), ("a.safetensors", False)])
def test_of_two_tensors_with_one_name_the_order_of_files_decides_and_not_the_index(
    file, wins, save_fine_tune
):
    source, _ = save_fine_tune("gpt2")
    name = "transformer.h.0.attn.c_proj.bias"
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").rename(source / WEIGHTS)
    new = torch.full_like(tensors[name], 7.0)
    save_file({name: new}, source / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {**dict.fromkeys(tensors, WEIGHTS), name: file}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load(source).state_dict()[name], new) == wins
