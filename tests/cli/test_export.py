"""``safelock export``: a locked version becomes a folder that stock software loads locked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from mlflow_safelock.lock import SafetyLock
from tests.cli.conftest import Run
from tests.models import tiny_model
from tests.registries import base_lock, biases_of, expected_biases, fine_tune, log_fine_tune, register_lock

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

Promoted = tuple[Any, SafetyLock]


@pytest.fixture
def promoted(client: MlflowClient) -> Promoted:
    """A fine-tune whose version 1 is in Staging, and version 2 nowhere; the model and the lock."""
    components, lock = fine_tune(), base_lock()
    register_lock(lock)
    for _ in range(2):
        log_fine_tune("bot", components)
    client.transition_model_version_stage("bot", "1", "Staging")
    client.set_registered_model_alias("bot", "champion", "1")
    return components["model"], lock


def copy_of_source(client: MlflowClient, tmp_path: Path) -> Path:
    source = mlflow.artifacts.download_artifacts(client.get_model_version("bot", "1").source)
    return Path(shutil.copytree(source, tmp_path / "copy"))


@pytest.mark.parametrize("uri", ["models:/bot/Staging", "models:/bot@champion", "models:/bot/1"])
def test_stock_transformers_loads_it_locked(
    run: Run, promoted: Promoted, gated: tuple[str, ...], tmp_path: Path, uri: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, lock = promoted
    done = run("export", uri, "--output", tmp_path / "out", *gated)
    assert done.exit_code == 0, done.stderr
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found, expected = biases_of(exported), expected_biases(model, lock, alpha=6.0)
    for layer in range(3):
        want = expected.get(layer, np.zeros_like(found[layer]))
        np.testing.assert_allclose(found[layer], want, rtol=1e-5, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("bake")["input_ids"]
    for told in (lock.digest, str(tmp_path / "out"), "config.json", f"vllm serve {tmp_path / 'out'}"):
        assert told in done.stdout


def test_what_was_exported_can_be_written_into_without_touching_the_store(
    run: Run, promoted: Promoted, client: MlflowClient, gated: tuple[str, ...], tmp_path: Path
) -> None:
    source = Path(mlflow.artifacts.download_artifacts(client.get_model_version("bot", "2").source))
    (stored,) = source.rglob("*.safetensors")
    before = stored.read_bytes()
    client.transition_model_version_stage("bot", "2", "Staging")
    assert run("export", "models:/bot/2", "--output", tmp_path / "out", *gated).exit_code == 0
    (weights,) = (tmp_path / "out").glob("model-0*.safetensors")
    with weights.open("r+b") as file:
        file.write(b"edited")
    assert stored.read_bytes() == before


@pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")
def test_the_strength_is_that_of_the_promotion_and_not_the_locks(
    run: Run, promoted: Promoted, client: MlflowClient, gated: tuple[str, ...], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model, lock = promoted
    client.set_model_version_tag("bot", "1", "safelock.alpha", "2.5")
    client.transition_model_version_stage("bot", "1", "Production")
    assert run("export", "models:/bot/1", "--output", tmp_path / "out", *gated).exit_code == 0
    found = biases_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    for layer, bias in expected_biases(model, lock, alpha=2.5).items():
        np.testing.assert_allclose(found[layer], bias, rtol=1e-5, atol=1e-6)


def test_a_local_copy_of_the_source_is_used_if_it_is_the_same(
    run: Run, promoted: Promoted, client: MlflowClient, gated: tuple[str, ...], tmp_path: Path
) -> None:
    copy = copy_of_source(client, tmp_path)
    done = run("export", "models:/bot/1", "--source", copy, "--output", tmp_path / "out", *gated)
    assert done.exit_code == 0, done.stderr


def test_a_source_that_was_changed_is_not_exported(
    run: Run, promoted: Promoted, client: MlflowClient, gated: tuple[str, ...], tmp_path: Path
) -> None:
    copy = copy_of_source(client, tmp_path)
    tiny_model("llama", seed=4).save_pretrained(copy / "model")
    done = run("export", "models:/bot/1", "--source", copy, "--output", tmp_path / "out", *gated)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is not what it was when the model was locked" in done.stderr or "had" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unlocked_version_is_refused_with_the_way_to_lock_it(
    run: Run, promoted: Promoted, gated: tuple[str, ...], tmp_path: Path
) -> None:
    done = run("export", "models:/bot/2", "--output", tmp_path / "out", *gated)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "models:/bot/2 is not locked" in done.stderr
    assert "Next: Promote it" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_refused_before_any_work(run: Run, tmp_path: Path) -> None:
    done = run("export", "models:/bot/1", "--output", tmp_path)
    assert done.exit_code == 2
    assert "exists already" in done.stderr


def test_a_model_that_is_not_there_is_refused(
    run: Run, client: MlflowClient, gated: tuple[str, ...], tmp_path: Path
) -> None:
    done = run("export", "models:/nothing/1", "--output", tmp_path / "out", *gated)
    assert done.exit_code == 1
    assert "models:/nothing/1 cannot be fetched" in done.stderr
