"""MODEL arguments: what can be loaded, and what is said about what cannot."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mlflow_safelock.apply import save_locked_checkpoint
from mlflow_safelock.errors import PromotionRefused, SafelockError, SourceError
from mlflow_safelock.formats import load_lock
from mlflow_safelock.loading import ModelLoading, geometry_of, load_language_model
from mlflow_safelock.lock import AttentionGeometry
from tests.cli.conftest import BASE, Run, Workshop
from tests.models import tiny_model
from tests.registries import base_lock, fine_tune, log_fine_tune, register_lock

GEOMETRY = AttentionGeometry(layers=3, heads=4, head_dim=8, hidden=48)


def test_a_folder_gives_model_and_tokenizer_in_evaluation_mode(workshop: Workshop) -> None:
    loaded = load_language_model(str(workshop.model))
    assert loaded.identity is None, "a folder's path is no name for a base model"
    assert not loaded.model.training
    stored = load_file(workshop.model / "model.safetensors")
    assert torch.equal(loaded.model.state_dict()["model.norm.weight"], stored["model.norm.weight"])
    assert loaded.tokenizer("bake")["input_ids"]


def test_the_number_format_can_be_chosen(workshop: Workshop) -> None:
    assert load_language_model(str(workshop.model)).model.dtype == torch.float32
    assert (
        load_language_model(str(workshop.model), ModelLoading(dtype="bfloat16")).model.dtype == torch.bfloat16
    )


@pytest.mark.parametrize("form", ["models:/bot/1", "folder"])
def test_a_model_of_mlflow_says_what_its_base_is(client: Any, form: str) -> None:
    components = fine_tune(base=BASE)
    log_fine_tune("bot", components)
    reference = form if form != "folder" else client.get_model_version_download_uri("bot", "1")
    loaded = load_language_model(reference.removeprefix("file://"), ModelLoading(dtype="bfloat16"))
    assert (loaded.identity, loaded.model.dtype) == (BASE, torch.bfloat16)
    expected = components["model"].state_dict()["model.norm.weight"].to(torch.bfloat16)
    assert torch.equal(loaded.model.state_dict()["model.norm.weight"], expected)
    assert geometry_of(reference.removeprefix("file://")) == GEOMETRY


@pytest.mark.parametrize("read", [load_language_model, geometry_of])
def test_a_locked_model_is_refused_with_the_way_to_its_source(client: Any, read: Callable[..., Any]) -> None:
    log_fine_tune("bot")
    source = client.get_model_version_download_uri("bot", "1")
    register_lock(base_lock())
    client.set_registered_model_alias("bot", "champion", "1")
    with pytest.raises(SourceError, match="is locked already") as info:
        read("models:/bot@champion")
    assert source in info.value.next_step


@pytest.mark.parametrize("read", [load_language_model, geometry_of])
def test_a_standalone_locked_model_is_refused_with_the_way_to_its_source(
    client: Any,
    run: Run,
    gated: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[..., Any],
) -> None:
    policy = tmp_path / "safelock.yaml"
    policy.write_text("version: 1\ngates: [{carrier: standalone}]\n")
    monkeypatch.setenv("SAFELOCK_POLICY", str(policy))
    log_fine_tune("bot")
    source = client.get_model_version_download_uri("bot", "1")
    register_lock(base_lock())
    assert run("prepare", "models:/bot/1", *gated).exit_code == 0
    client.set_registered_model_alias("bot", "champion", "1")
    with pytest.raises(SourceError, match="is locked already") as info:
        read("models:/bot@champion")
    assert source in info.value.next_step


@pytest.mark.parametrize("read", [load_language_model, geometry_of])
def test_a_model_logged_from_locked_weights_is_refused_as_locked(
    client: Any, workshop: Workshop, tmp_path: Path, read: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM

    save_locked_checkpoint(workshop.model, tmp_path / "locked", load_lock(workshop.lock))
    locked = AutoModelForCausalLM.from_pretrained(tmp_path / "locked")
    log_fine_tune("bot", {**fine_tune(), "model": locked})
    with pytest.raises(SourceError, match="is locked already") as info:
        read("models:/bot/1")
    assert info.value.next_step == "Name the fine-tune that it was made from."


def test_a_model_that_loads_with_other_weights_is_refused(client: Any) -> None:
    from peft import LoraConfig, get_peft_model

    components = fine_tune(base=None)
    adapted = get_peft_model(
        components["model"], LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    log_fine_tune("bot", {**components, "model": adapted})
    with pytest.raises(PromotionRefused) as info:
        load_language_model("models:/bot/1")
    assert "merge_and_unload" in info.value.next_step


def test_the_shape_of_a_folder_needs_its_configuration_only(workshop: Workshop, tmp_path: Path) -> None:
    shutil.copy(workshop.model / "config.json", tmp_path)
    assert geometry_of(str(tmp_path)) == GEOMETRY


@pytest.mark.parametrize(
    ("reference", "cause"),
    [
        ("./nowhere", "no model folder at ./nowhere"),
        ("/nowhere/at/all", "no model folder"),
        ("org/not-in-the-cache", "org/not-in-the-cache has no configuration"),
        ("models:/nothing/1", "models:/nothing/1 cannot be fetched"),
    ],
)
def test_a_model_that_is_not_there_is_an_error_with_a_next_step(
    client: Any, reference: str, cause: str
) -> None:
    for read in (load_language_model, geometry_of):
        with pytest.raises(SourceError, match=cause) as info:
            read(reference)
        assert info.value.next_step


def test_pickled_weights_are_not_loaded(workshop: Workshop, tmp_path: Path) -> None:
    for path in workshop.model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    torch.save(tiny_model("llama", seed=3).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_language_model(str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run(workshop: Workshop, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    folder = shutil.copytree(workshop.model, tmp_path / "model")
    (folder / "modeling.py").write_text(f"open({str(proof)!r}, 'w')\n")
    config = (folder / "config.json").read_text()
    hook = '{"auto_map": {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"},'
    (folder / "config.json").write_text(config.replace("{", hook, 1).replace('"llama"', '"own"'))
    with pytest.raises(SafelockError):
        load_language_model(str(folder))
    assert not proof.exists()


def test_a_device_that_is_not_there_is_an_error(workshop: Workshop) -> None:
    with pytest.raises(SourceError, match="no device 'tpu'") as info:
        load_language_model(str(workshop.model), ModelLoading(device="tpu"))
    assert "--device cpu" in info.value.next_step


SPREAD = ModelLoading(device_map="auto")


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Main memory for some of the tiny model's layers, as accelerate sees it."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=190_000, total=190_000))


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("place", ["folder", "folder, with room", "mlflow"])
def test_what_does_not_fit_in_memory_stays_on_disk(
    workshop: Workshop, tmp_path: Path, client: Any, place: str
) -> None:
    reference, loading = str(workshop.model), SPREAD
    if place == "mlflow":
        log_fine_tune("bot", fine_tune(base=BASE))
        reference = "models:/bot/1"
    elif "room" in place:
        loading = ModelLoading(device_map="sequential", offload_folder=tmp_path / "offload")
    whole, spread = load_language_model(reference).model, load_language_model(reference, loading).model
    assert "disk" in spread.hf_device_map.values()
    assert not whole.training
    assert not spread.training
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.allclose(whole(tokens).logits, spread(tokens).logits, atol=1e-5)
    assert not [name for name in os.environ if "DEVICE_MAP" in name]


def test_a_device_map_needs_accelerate(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SourceError, match="accelerate, which is not installed") as info:
        load_language_model(str(workshop.model), SPREAD)
    assert "mlflow-safelock[large]" in info.value.next_step


def test_mlflow_takes_no_offload_folder(client: Any, tmp_path: Path) -> None:
    log_fine_tune("bot")
    with pytest.raises(SourceError, match="takes no folder to offload"):
        load_language_model("models:/bot/1", ModelLoading(device_map="auto", offload_folder=tmp_path))
