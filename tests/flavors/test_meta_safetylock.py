"""A lock is an MLflow model: saved, logged, registered, described, loaded."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_safelock.errors import LockError
from mlflow_safelock.flavors import meta_safetylock
from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from tests.models import random_lock
from tests.registries import BASE, base_lock, files_below


def test_the_registered_name_follows_the_base_and_is_one_that_mlflow_takes(client: MlflowClient) -> None:
    name = lock_model_name("meta-llama/Meta-Llama-3-8B-Instruct")
    assert name == "safelock.meta-llama--Meta-Llama-3-8B-Instruct"
    client.create_registered_model(name)
    client.create_registered_model(lock_model_name("C:/models/base"))


def test_a_saved_lock_loads_equal(tmp_path: Path) -> None:
    lock = base_lock()
    meta_safetylock.save_model(lock, tmp_path / "lock", metadata={"team": "safety"})
    assert meta_safetylock.load_model(str(tmp_path / "lock")) == lock
    described = yaml.safe_load((tmp_path / "lock/MLmodel").read_text())
    assert described["flavors"]["safelock"]["digest"] == lock.digest
    assert described["metadata"] == {"team": "safety"}
    assert files_below(tmp_path / "lock") == {
        *("MLmodel", "lock.safetensors", "head_scores.png"),
        *("conda.yaml", "python_env.yaml", "requirements.txt"),
    }
    assert "mlflow-safelock==" in (tmp_path / "lock/requirements.txt").read_text()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("here first")
    with pytest.raises(MlflowException, match="not empty"):
        meta_safetylock.save_model(base_lock(), tmp_path)
    assert files_below(tmp_path) == {"mine.txt"}


def test_each_registration_is_a_new_version_that_says_what_it_is(client: MlflowClient) -> None:
    first, second = base_lock(seed=0), base_lock(seed=1)
    with mlflow.start_run():
        infos = [meta_safetylock.register(lock) for lock in (first, second)]
    name = lock_model_name(BASE)
    assert [int(info.registered_model_version) for info in infos] == [1, 2]
    assert meta_safetylock.load_model(f"models:/{name}/1") == first
    assert meta_safetylock.load_model(f"models:/{name}/2") == second
    assert meta_safetylock.registered_lock_uri(BASE) == f"models:/{name}/2"
    tags = client.get_model_version(name, "2").tags
    logged = client.get_logged_model(infos[1].model_id)
    for shown in (tags, logged.tags):
        assert shown["safelock.base_model"] == BASE
        assert shown["safelock.heads"] == str(len(second.heads))
        assert shown["safelock.default_alpha"] == "6.0"
        assert shown["safelock.digest"] == second.digest
    assert logged.params["base_model"] == BASE
    assert logged.params["digest"] == second.digest
    kept = [float(second.scores[head.layer, head.head]) for head in second.heads]
    assert float(logged.params["best_score"]) == pytest.approx(max(kept), abs=1e-6)


def test_a_base_without_a_lock_has_no_lock_uri(client: MlflowClient) -> None:
    with pytest.raises(MlflowException, match="No lock is registered for the base model 'org/none'") as info:
        meta_safetylock.registered_lock_uri("org/none")
    assert info.value.error_code == "RESOURCE_DOES_NOT_EXIST"


def test_a_base_without_a_version_of_its_lock_or_with_quotes_in_its_name(client: MlflowClient) -> None:
    base = """/home/o'brien/"llama\""""
    client.create_registered_model(lock_model_name(base))
    with pytest.raises(MlflowException, match="No lock is registered for the base model"):
        meta_safetylock.registered_lock_uri(base)
    with mlflow.start_run():
        meta_safetylock.register(base_lock(base=base))
    assert meta_safetylock.registered_lock_uri(base) == f"models:/{lock_model_name(base)}/1"


def test_a_lock_swapped_in_the_store_is_not_loaded(client: MlflowClient) -> None:
    with mlflow.start_run():
        meta_safetylock.register(base_lock(seed=0))
    name = lock_model_name(BASE)
    folder = Path(client.get_model_version_download_uri(name, "1"))
    from mlflow_safelock.formats import save_lock

    (folder / "lock.safetensors").unlink()
    save_lock(base_lock(seed=1), folder / "lock.safetensors")
    with pytest.raises(LockError, match="MLmodel file says"):
        meta_safetylock.load_model(f"models:/{name}/1")


def test_the_picture_shows_scores_with_the_locked_heads_framed(tmp_path: Path) -> None:
    from matplotlib.image import imread
    from matplotlib.patches import Rectangle

    from mlflow_safelock.flavors.plots import head_map

    lock = random_lock(base_lock().geometry, seed=5, base_model=BASE)
    figure = head_map(lock)
    axes = figure.axes[0]
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert {(frame.get_y() + 0.5, frame.get_x() + 0.5) for frame in frames} == {
        (head.layer, head.head) for head in lock.heads
    }
    assert axes.images[0].get_array().shape == (lock.geometry.layers, lock.geometry.heads)
    figure.savefig(tmp_path / "map.png")
    assert imread(tmp_path / "map.png").std() > 0
