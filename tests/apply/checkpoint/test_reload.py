from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlflow_safelock.apply import save_locked_checkpoint
from mlflow_safelock.apply.checkpoint.reload import confirm_by_reloading
from mlflow_safelock.errors import CheckpointError

BIASES = "model-safelock.safetensors"
WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture
def folders(save_fine_tune, tmp_path):
    """Source, a sound locked checkpoint of it, and the lock."""
    source, lock = save_fine_tune("llama")
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    return source, tmp_path / "locked", lock


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, file: str, **values: torch.Tensor) -> None:
    tensors = load_file(folder / file)
    save_file({**tensors, **values}, folder / file, metadata={"format": "pt"})


def test_a_sound_checkpoint_is_confirmed_saying_how(folders):
    source, locked, lock = folders
    confirmation = confirm_by_reloading(source, locked, lock, 6.0)
    assert confirmation.max_logit_difference <= 1e-5
    assert confirmation.max_logit_change > 0.05
    assert "reloaded with transformers" in confirmation.check


def test_a_folder_that_reloads_unlocked_is_not_confirmed(folders):
    # The worst failure: the biases are there, and the configuration does not ask for them.
    source, locked, lock = folders
    change_config(locked, attention_bias=False)
    with pytest.raises(CheckpointError, match=r"unexpected keys.*bias"):
        confirm_by_reloading(source, locked, lock, 6.0)


def test_the_unlocked_source_itself_is_not_confirmed(folders):
    source, _, lock = folders
    with pytest.raises(CheckpointError, match=r"reloads without model\.layers"):
        confirm_by_reloading(source, source, lock, 6.0)


def test_another_alpha_or_lock_is_not_confirmed(folders):
    source, locked, lock = folders
    with pytest.raises(CheckpointError, match=r"another model\.layers.*o_proj\.bias"):
        confirm_by_reloading(source, locked, lock, 6.001)
    with pytest.raises(CheckpointError, match=r"another model\.layers.*o_proj\.bias"):
        confirm_by_reloading(source, locked, lock, -6.0)


def test_a_single_changed_number_is_found(folders):
    source, locked, lock = folders
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(locked / WEIGHTS)[name]
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    change_tensors(locked, WEIGHTS, **{name: weight})
    with pytest.raises(CheckpointError, match=f"another {name}"):
        confirm_by_reloading(source, locked, lock, 6.0)


@pytest.mark.parametrize("projection", ["q_proj", "o_proj"])
def test_a_bias_that_should_be_zero_and_is_not_is_found(folders, projection):
    source, locked, lock = folders
    biases = load_file(locked / BIASES)
    name = next(
        name for name, bias in biases.items() if projection in name and (projection == "q_proj" or bias.any())
    )
    change_tensors(locked, BIASES, **{name: biases[name] + 1e-3})
    with pytest.raises(CheckpointError, match=f"another {name}"):
        confirm_by_reloading(source, locked, lock, 6.0)


def test_a_missing_bias_is_found(folders):
    source, locked, lock = folders
    biases = load_file(locked / BIASES)
    name = "model.layers.0.self_attn.k_proj.bias"
    del biases[name]
    save_file(biases, locked / BIASES, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"missing keys.*{name}|cannot load"):
        confirm_by_reloading(source, locked, lock, 6.0)


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-2}, {"hidden_act": "relu"}], ids=str)
def test_a_configuration_that_computes_something_else_is_found_by_the_logits(folders, change):
    source, locked, lock = folders
    change_config(locked, **change)
    with pytest.raises(CheckpointError, match="logits that differ"):
        confirm_by_reloading(source, locked, lock, 6.0)


def test_a_weight_that_holds_no_number_where_no_lock_is_stays_what_it_is(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][-1] = torch.nan  # of a token that is never asked for
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = save_locked_checkpoint(source, tmp_path / "locked", lock, verify="reload")
    assert report.verified == "reload"
