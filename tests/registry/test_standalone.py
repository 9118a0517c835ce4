"""A standalone model: prepared by a command, found by the promotion, loaded locked by stock software."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import mlflow
import numpy as np
import pytest
import rfc8785
import torch
import yaml
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlflow_safelock.apply.checkpoint import unlock_checkpoint
from mlflow_safelock.cli.main import main
from mlflow_safelock.gate import locked_models
from mlflow_safelock.registry.artifacts import RegistryArtifacts
from tests.registries import (
    base_lock,
    biases_of,
    expected_biases,
    files_below,
    fine_tune,
    log_fine_tune,
    register_lock,
    state_of,
)
from tests.registry.s3_server import S3Server, s3_server
from tests.servers import mlflow_server

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

POLICY = """
version: 1
gates:
  - carrier: standalone
    alpha: {default: 2.0}
"""


@pytest.fixture(autouse=True)
def policy(client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "safelock.yaml"
    path.write_text(POLICY)
    monkeypatch.setenv("SAFELOCK_POLICY", str(path))


def stage(client: MlflowClient, version: int) -> None:
    client.transition_model_version_stage("bot", str(version), "Staging")


def run_prepare(tmp_path: Path, version: int, *options: str, form: str = "json") -> Result:
    return CliRunner().invoke(
        main,
        [
            *("prepare", f"models:/bot/{version}", "--format", form),
            *("--registry-uri", f"safelock+sqlite:///{tmp_path}/registry.db"),
            *("--tracking-uri", f"sqlite:///{tmp_path}/tracking.db"),
            *options,
        ],
    )


def prepare(tmp_path: Path, version: int, *options: str) -> dict[str, Any]:
    done = run_prepare(tmp_path, version, *options)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def folder_of(location: str) -> Path:
    return Path(local_file_uri_to_path(location))


def test_a_promotion_without_preparation_is_refused_and_names_the_command(client: MlflowClient) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    before = state_of(client, "bot", version)
    with pytest.raises(MlflowException, match=rf"not_prepared.*safelock prepare models:/bot/{version}"):
        stage(client, version)
    assert state_of(client, "bot", version) == before


def test_a_folder_counts_only_with_the_receipt_that_the_ledger_names(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    made = prepare(tmp_path, version)
    folder = folder_of(made["location"])
    receipt = json.loads((folder / "receipt.json").read_text())
    shards = {
        path: load_file(folder / path) for path in receipt["predicate"]["files"] if path.endswith("tensors")
    }
    (path,) = [path for path, tensors in shards.items() if any("bias" in name for name in tensors)]
    (folder / path).unlink()
    save_file({name: torch.zeros_like(tensor) for name, tensor in shards[path].items()}, folder / path)
    receipt["predicate"]["files"][path] = hashlib.sha256((folder / path).read_bytes()).hexdigest()
    (folder / "receipt.json").write_bytes(rfc8785.dumps(receipt))
    with pytest.raises(MlflowException, match=r"receipt.*is not the one that the ledger names"):
        stage(client, version)
    assert client.get_model_version("bot", str(version)).current_stage == "None"
    # As a folder is that nobody put on record: written by a preparation that died, or by somebody else.
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        assert connection.execute("DELETE FROM safelock_ledger WHERE event = 'written'").rowcount == 1
    with pytest.raises(MlflowException, match="not_prepared"):
        stage(client, version)
    forged = snapshot(folder)
    made = prepare(tmp_path, version)
    assert snapshot(folder) == forged, "a whole folder is somebody's, and stays"
    folder = folder_of(made["location"])
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        connection.execute("DELETE FROM safelock_ledger WHERE event = 'written'")
    (folder / "MLmodel").unlink()
    (folder / "more").write_text("x")
    assert prepare(tmp_path, version)["location"] == made["location"]
    assert not (folder / "more").exists(), "nobody's parts are left in it"
    receipt = (folder / "receipt.json").read_bytes()
    twin = client.create_model_version("bot", client.get_model_version("bot", str(version)).source).version
    assert prepare(tmp_path, int(twin))["location"] == made["location"]
    assert (folder / "receipt.json").read_bytes() == receipt, "one that is on record is left as it is"
    stage(client, version)
    assert client.get_model_version_download_uri("bot", str(version)) == made["location"]
    assert load_file(folder / path).keys() == shards[path].keys()
    assert all(torch.equal(tensor, shards[path][name]) for name, tensor in load_file(folder / path).items())


def damaged_receipt(folder: Path) -> None:
    (folder / "receipt.json").unlink()
    (folder / "receipt.json").write_text("{}")


def lost_file(folder: Path) -> None:
    (folder / "model" / "config.json").unlink()


def cut_weights(folder: Path) -> None:
    path = max((folder / "model").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    path.unlink()  # it may be a link
    path.write_bytes(data[:5])


@pytest.mark.parametrize("damage", [damaged_receipt, lost_file, cut_weights])
def test_a_model_that_was_damaged_is_prepared_and_promoted_again(
    client: MlflowClient, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    first = prepare(tmp_path, version)["location"]
    stage(client, version)
    damage(folder_of(first))
    with pytest.raises(MlflowException, match="not_locked"):
        client.get_model_version_download_uri("bot", str(version))
    with pytest.raises(MlflowException, match=rf"unreadable.*safelock prepare models:/bot/{version}"):
        stage(client, version)
    location = prepare(tmp_path, version)["location"]
    assert location != first
    stage(client, version)
    assert client.get_model_version_download_uri("bot", str(version)) == location
    assert biases_of(mlflow.transformers.load_model("models:/bot/Staging").model)
    assert prepare(tmp_path, version)["check"] is None, "it is there already"


def test_another_registry_on_the_same_artifacts_takes_nothing_away(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    original = client.get_model_version_download_uri("bot", str(version))
    location = prepare(tmp_path, version)["location"]
    stage(client, version)
    before = snapshot(folder_of(location))
    other = f"safelock+sqlite:///{tmp_path}/other.db"
    mlflow.set_registry_uri(other)
    theirs = MlflowClient()
    theirs.create_registered_model("bot")
    number = int(theirs.create_model_version("bot", original).version)
    register_lock(base_lock())
    found = prepare(tmp_path, number, "--registry-uri", other)["location"]
    assert found != location
    assert snapshot(folder_of(location)) == before
    stage(theirs, number)
    assert theirs.get_model_version_download_uri("bot", str(number)) == found
    assert client.get_model_version_download_uri("bot", str(version)) == location
    stage(client, version)


def test_what_an_earlier_version_of_this_package_prepared_is_promoted(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    with monkeypatch.context() as patch:
        named = locked_models._standalone_at
        patch.setattr(locked_models, "_standalone_at", lambda approved, *_: named(approved))
        location = prepare(tmp_path, version)["location"]
    assert prepare(tmp_path, version)["location"] == location
    stage(client, version)
    assert client.get_model_version_download_uri("bot", str(version)) == location


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_prepared_model_is_promoted_and_loads_locked_in_stock_software(
    client: MlflowClient, tmp_path: Path, family: str
) -> None:
    components = fine_tune(family)
    version = log_fine_tune("bot", components, input_example=["how do i bake"])
    geometry = mlflow_geometry(components["model"])
    lock = base_lock(**geometry)
    register_lock(lock)
    before = state_of(client, "bot", version)
    made = prepare(tmp_path, version)
    assert made["carrier"] == "standalone"
    assert made["alpha"] == 2.0
    assert state_of(client, "bot", version) == before, "nothing is promoted yet"
    stage(client, version)
    after = state_of(client, "bot", version)
    assert after["location"] == made["location"]
    assert after["tags"]["safelock.applied_alpha"] == "2"

    locked = pushed(components["model"], lock)
    pipeline = mlflow.transformers.load_model("models:/bot/Staging")
    assert torch.allclose(logits(pipeline.model), locked, atol=1e-5)
    loaded = mlflow.pyfunc.load_model("models:/bot/Staging")
    assert isinstance(loaded.predict(["how do i bake"])[0], str)
    assert list(loaded.input_example) == ["how do i bake"]
    assert loaded.metadata.signature == mlflow.models.get_model_info(before["location"]).signature
    stock = AutoModelForCausalLM.from_pretrained(folder_of(made["location"]) / "model")
    assert torch.allclose(logits(stock), locked, atol=1e-5)
    AutoTokenizer.from_pretrained(folder_of(made["location"]) / "model")
    assert prepare(tmp_path, version)["check"] is None, "it is there already"


def mlflow_geometry(model: torch.nn.Module) -> dict[str, int]:
    from mlflow_safelock.apply import geometry_from_config

    return dict(geometry_from_config(model.config).model_dump())


def pushed(model: torch.nn.Module, lock: Any) -> torch.Tensor:
    from mlflow_safelock.apply import apply_lock

    with apply_lock(model, lock, 2.0):
        return logits(model)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 15)[None]).logits


def test_the_weights_are_shared_and_the_source_stays_as_it_was(client: MlflowClient, tmp_path: Path) -> None:
    version = log_fine_tune("bot")
    source = folder_of(state_of(client, "bot", version)["location"])
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    register_lock(base_lock())
    folder = folder_of(prepare(tmp_path, version)["location"])
    weights = source / "model" / "model.safetensors"
    shared = [path for path in (folder / "model").glob("*.safetensors") if os.path.samefile(path, weights)]
    assert len(shared) == 1 or weights.stat().st_nlink == 1, "a reflink, or one hard link"
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert not list(folder.parent.glob(".*")), "nothing half written is left"


@pytest.mark.parametrize("file", ["model/config.json", "MLmodel", "model/model-safelock.safetensors"])
def test_a_prepared_model_that_was_changed_is_not_promoted(
    client: MlflowClient, tmp_path: Path, file: str
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    before = state_of(client, "bot", version)
    path = folder_of(prepare(tmp_path, version)["location"]) / file
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(MlflowException, match=f"unreadable.*{path.name}"):
        stage(client, version)
    assert state_of(client, "bot", version) == before


def test_weights_that_were_swapped_for_others_of_their_size_are_not_handed_out(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    folder = folder_of(prepare(tmp_path, version)["location"])
    stage(client, version)
    assert client.get_model_version_download_uri("bot", str(version)) == str(folder)
    receipt = json.loads((folder / "receipt.json").read_text())
    weights = folder / max(receipt["predicate"]["shared"], key=lambda path: (folder / path).stat().st_size)
    assert weights.suffix == ".safetensors"
    before = weights.stat()
    data = weights.read_bytes()
    weights.unlink()  # it may be a link
    weights.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(MlflowException, match=rf"not_locked.*'model/{weights.name}'.*is not what it was"):
        client.get_model_version_download_uri("bot", str(version))


def test_a_source_that_changed_after_the_preparation_is_not_promoted(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    before = state_of(client, "bot", version)
    prepare(tmp_path, version)
    config = folder_of(before["location"]) / "model" / "generation_config.json"
    config.write_text(config.read_text().replace("8", "9"))
    with pytest.raises(MlflowException, match=r"generation_config\.json"):
        stage(client, version)
    assert state_of(client, "bot", version) == before


def test_a_newer_lock_needs_another_preparation(client: MlflowClient, tmp_path: Path) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    first = prepare(tmp_path, version)["location"]
    register_lock(base_lock(seed=1))
    with pytest.raises(MlflowException, match="not_prepared"):
        stage(client, version)
    assert prepare(tmp_path, version)["location"] != first
    stage(client, version)


def test_a_preparation_says_what_rounding_costs_and_how_weights_came_there(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    made = prepare(tmp_path, version)
    assert 0 < made["bias_error"] < 2**-24
    (how,) = made["weights"].values()
    assert how in ("reflink", "hard link")
    assert made["check"].startswith("reloaded")
    shutil.rmtree(folder_of(made["location"]))
    shown = run_prepare(tmp_path, version, form="table").stdout
    assert f"1 {how}" in shown
    assert f"{made['bias_error']:.1e}, relative" in shown


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("model/config.json", None),
        ("model/model-00001-of-00001.safetensors", b"other"),
        ("receipt.json", b"{}"),
        ("MLmodel.source", b"{}"),
    ],
)
def test_a_fine_tune_with_files_where_the_locked_model_has_its_own_is_refused(
    client: MlflowClient, tmp_path: Path, path: str, content: bytes | None
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    folder = folder_of(state_of(client, "bot", version)["location"])
    (folder / "model").rename(folder / "weights")
    describe(folder, lambda flavors: flavors["transformers"].update(model_binary="weights"))
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_bytes(content or (folder / "weights/config.json").read_bytes())
    before = snapshot(folder)
    done = run_prepare(tmp_path, version)
    assert (done.exit_code, f"has a file {path!r}" in done.output.replace("\n", " ")) == (1, True)
    assert snapshot(folder) == before
    assert not folder.with_name(f"{folder.name}-safelock").exists()


def test_a_fine_tune_that_another_loader_or_flavor_would_serve_is_refused(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    folder = folder_of(state_of(client, "bot", version)["location"])
    sound = (folder / "MLmodel").read_bytes()
    describe(folder, lambda flavors: flavors["python_function"].update(loader_module="my_loader"))
    done = run_prepare(tmp_path, version)
    assert (done.exit_code, "is loaded by 'my_loader'" in done.output) == (1, True)
    (folder / "MLmodel").write_bytes(sound)
    describe(folder, lambda flavors: flavors.update(onnx={"data": "model.onnx"}))
    done = run_prepare(tmp_path, version)
    assert (done.exit_code, "has the flavor 'onnx' too" in done.output) == (1, True)
    assert not folder.with_name(f"{folder.name}-safelock").exists()
    (folder / "MLmodel").write_bytes(sound)
    prepare(tmp_path, version)


def describe(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the flavors that an MLmodel file tells of."""
    described = yaml.safe_load((folder / "MLmodel").read_text())
    change(described["flavors"])
    (folder / "MLmodel").write_text(yaml.safe_dump(described))


def test_a_preparation_that_fails_leaves_nothing_behind(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    location = folder_of(state_of(client, "bot", version)["location"])

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locked_models, "write_standalone", full)
    done = run_prepare(tmp_path, version)
    assert done.exit_code == 1
    assert "No space left" in done.output
    assert not location.with_name(f"{location.name}-safelock").exists()


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_prepared_model_is_undone_to_what_was_logged(
    client: MlflowClient, tmp_path: Path, family: str
) -> None:
    components = fine_tune(family)
    version = log_fine_tune("bot", components, input_example=["how do i bake"])
    register_lock(base_lock(**mlflow_geometry(components["model"])))
    source = folder_of(state_of(client, "bot", version)["location"])
    prepare(tmp_path, version)
    stage(client, version)
    done = undo(tmp_path, "models:/bot/Staging", tmp_path / "unlocked")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert snapshot(tmp_path / "unlocked") == snapshot(source)
    assert set(found["files"]) == set(snapshot(source))
    assert found["missing"] == []
    pipeline = mlflow.transformers.load_model(str(tmp_path / "unlocked"))
    assert torch.equal(logits(pipeline.model), logits(components["model"]))


def test_what_is_no_standalone_model_is_not_undone(client: MlflowClient, tmp_path: Path) -> None:
    version = log_fine_tune("bot")
    done = undo(tmp_path, f"models:/bot/{version}", tmp_path / "unlocked")
    assert (done.exit_code, "is not locked" in done.output) == (1, True)
    done = undo(tmp_path, str(tmp_path / "nothing"), tmp_path / "unlocked")
    assert (done.exit_code, "There is no folder" in done.output) == (1, True)
    assert not (tmp_path / "unlocked").exists()


def test_a_model_that_was_changed_is_not_undone(client: MlflowClient, tmp_path: Path) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    folder = folder_of(prepare(tmp_path, version)["location"])
    (folder / "MLmodel.source").write_text("flavors: {transformers: {model_binary: ../..}}")
    done = undo(tmp_path, str(folder), tmp_path / "unlocked")
    assert (done.exit_code, "is not the one of its receipt" in done.output) == (1, True)
    assert not (tmp_path / "unlocked").exists()


def undo(tmp_path: Path, model: str, output: Path) -> Result:
    return CliRunner().invoke(
        main,
        [
            *("undo", model, "--output", str(output), "--format", "json"),
            *("--registry-uri", f"safelock+sqlite:///{tmp_path}/registry.db"),
            *("--tracking-uri", f"sqlite:///{tmp_path}/tracking.db"),
        ],
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "registered_model_meta"
    }


def test_a_version_with_the_lock_in_its_weights_is_exported_as_it_is(
    client: MlflowClient, tmp_path: Path
) -> None:
    components = fine_tune("llama")
    version = log_fine_tune("bot", components)
    lock = base_lock()
    register_lock(lock)
    folder = folder_of(prepare(tmp_path, version)["location"])
    stage(client, version)
    done = export(tmp_path, "models:/bot/Staging", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert snapshot(tmp_path / "out") == snapshot(folder / "model")
    assert lock.digest in done.stdout
    assert "its files are those of the receipt" in done.stdout
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(stock), pushed(components["model"], lock), atol=1e-5)
    done = export(tmp_path, "models:/bot/Staging", tmp_path / "linked", "--sharing", "link")
    (weights,) = (tmp_path / "linked").glob("model-0*.safetensors")
    assert weights.samefile(folder / "model" / weights.name) or "1 reflink" in done.stdout, done.output
    done = export(tmp_path, "models:/bot/Staging", tmp_path / "other", "--source", str(tmp_path))
    assert (done.exit_code, "Leave --source away" in done.output) == (1, True)


def test_what_was_exported_or_undone_can_be_written_into_without_touching_the_store(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    source = folder_of(state_of(client, "bot", version)["location"])
    folder = folder_of(prepare(tmp_path, version)["location"])
    stage(client, version)
    assert export(tmp_path, "models:/bot/Staging", tmp_path / "exported").exit_code == 0
    assert undo(tmp_path, "models:/bot/Staging", tmp_path / "undone").exit_code == 0
    assert undo(tmp_path, str(tmp_path / "exported"), tmp_path / "undone again").exit_code == 0
    before = snapshot(source), snapshot(folder)
    for path in (
        *(tmp_path / "exported").glob("*.safetensors"),
        *(tmp_path / "undone").rglob("*.safetensors"),
        *(tmp_path / "undone again").rglob("*.safetensors"),
    ):
        with path.open("r+b") as file:
            file.write(b"edited")
    assert (snapshot(source), snapshot(folder)) == before


def export(tmp_path: Path, model: str, output: Path, *options: str) -> Result:
    return CliRunner().invoke(
        main,
        [
            *("export", model, "--output", str(output), *options),
            *("--registry-uri", f"safelock+sqlite:///{tmp_path}/registry.db"),
            *("--tracking-uri", f"sqlite:///{tmp_path}/tracking.db"),
        ],
    )


def test_a_model_behind_a_server_is_fetched_and_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: MlflowClient
) -> None:
    with mlflow_server(tmp_path / "server") as server:
        mlflow.set_tracking_uri(server.url)
        mlflow.set_registry_uri(server.url)
        mlflow.set_experiment("behind a server")
        components = fine_tune("gpt2")
        version = log_fine_tune("bot", components)
        lock = base_lock(**mlflow_geometry(components["model"]))
        register_lock(lock)
        location = MlflowClient(server.url).get_model_version_download_uri("bot", str(version))
        assert location.startswith("mlflow-artifacts:")
        done = CliRunner().invoke(
            main,
            [
                *("prepare", f"models:/bot/{version}", "--format", "json"),
                *("--registry-uri", server.registry_uri, "--tracking-uri", server.url),
            ],
        )
        assert done.exit_code == 0, done.output
        made = json.loads(done.stdout)
        assert made["location"].startswith(f"{location}-safelock/")
        assert set(made["weights"].values()) == {"fetched and uploaded"}
        locked = download(made["location"], tmp_path / "locked")
        assert files_below(locked / "components"), "folders in folders are there, too"
        stock = AutoModelForCausalLM.from_pretrained(locked / "model")
        assert torch.allclose(logits(stock), pushed(components["model"], lock), atol=1e-5)


@pytest.mark.parametrize("before", [False, True], ids=["new", "there already"])
def test_a_folder_with_folders_is_published_on_a_disk(tmp_path: Path, before: bool) -> None:
    folder = tmp_path / "folder"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "file").write_text("here")
    for _ in range(2 if before else 1):
        RegistryArtifacts().publish(folder, str(tmp_path / "published" / "model"))
    assert (tmp_path / "published" / "model" / "a" / "b" / "file").read_text() == "here"
    assert [path.name for path in (tmp_path / "published").iterdir()] == ["model"]


def test_what_a_promotion_would_refuse_is_not_prepared(client: MlflowClient, tmp_path: Path) -> None:
    version = log_fine_tune("bot")
    location = folder_of(state_of(client, "bot", version)["location"])
    done = CliRunner().invoke(
        main,
        [
            *("prepare", f"models:/bot/{version}"),
            *("--registry-uri", f"safelock+sqlite:///{tmp_path}/registry.db"),
        ],
    )
    assert done.exit_code == 1
    assert "No lock is registered" in done.output
    assert not location.with_name(f"{location.name}-safelock").exists()
    wrong = CliRunner().invoke(main, ["prepare", f"models:/bot/{version}", "--registry-uri", "http://x"])
    assert wrong.exit_code == 1
    assert "safelock+sqlite" in wrong.output


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """S3, where the tests' experiment keeps its artifacts."""
    with s3_server() as server:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",
            "MLFLOW_S3_ENDPOINT_URL": server.url,
        }.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3", endpoint_url=server.url).create_bucket(Bucket="models")
        mlflow.create_experiment("on s3", artifact_location="s3://models/artifacts")
        mlflow.set_experiment("on s3")
        yield server


def download(location: str, to: Path) -> Path:
    return Path(mlflow.artifacts.download_artifacts(location, dst_path=str(to)))


@pytest.fixture
def large(s3: S3Server) -> dict[str, Any]:
    """A model on S3 whose weights are mostly something else than attention."""
    components = fine_tune(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        hidden_size=128,
        intermediate_size=32_768,
    )
    log_fine_tune("bot", components)
    return components


def test_on_s3_the_store_copies_the_weights_itself(
    client: MlflowClient, tmp_path: Path, s3: S3Server, large: dict[str, Any]
) -> None:
    lock = base_lock(layers=2, heads=4, head_dim=32, hidden=128)
    register_lock(lock)
    size = sum(parameter.nbytes for parameter in large["model"].parameters())
    s3.forget()
    made = prepare(tmp_path, 1)
    assert sum(one.sent + one.received for one in s3.passed) < 0.03 * size
    assert made["location"].startswith("s3://")
    assert made["weights"] == {"model/model-00001-of-00001.safetensors": "copied by the store"}
    assert "compared with the source's by size and by blocks" in made["check"]
    stage(client, 1)
    receipt = json.loads(mlflow.artifacts.load_text(f"{made['location']}/receipt.json"))
    assert receipt["predicate"]["check"] == made["check"]
    loaded = mlflow.transformers.load_model("models:/bot/Staging").model
    assert biases_of(loaded).keys() == expected_biases(large["model"], lock, 2.0).keys()
    for layer, bias in expected_biases(large["model"], lock, 2.0).items():
        np.testing.assert_allclose(biases_of(loaded)[layer], bias, rtol=1e-5, atol=1e-6)
    assert torch.allclose(logits(loaded), pushed(large["model"], lock), atol=1e-5)


def test_on_s3_tensors_beside_the_weights_are_whole_and_what_is_not_carried_is_not_fetched(
    client: MlflowClient, tmp_path: Path, s3: S3Server
) -> None:
    steering = tmp_path / "steer.safetensors"
    save_file({"numbers": torch.randn(600, 600)}, steering)
    log_fine_tune("bot")
    register_lock(base_lock())
    source = state_of(client, "bot", 1)["location"]
    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    beside = {
        "steering/steer.safetensors": steering.read_bytes(),
        "model/consolidated.00.pth": bytes(16 << 20),
    }
    for path, data in beside.items():
        boto3.client("s3", endpoint_url=s3.url).put_object(Bucket=bucket, Key=f"{prefix}/{path}", Body=data)
    s3.forget()
    made = prepare(tmp_path, 1)
    assert sum(one.sent + one.received for one in s3.passed) < 16 << 20
    stage(client, 1)
    copy = next(download(made["location"], tmp_path / "locked").rglob("steer.safetensors"))
    assert copy.read_bytes() == steering.read_bytes()
    assert biases_of(mlflow.transformers.load_model("models:/bot/Staging").model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_was_made_on_s3_can_be_undone_byte_for_byte(
    client: MlflowClient, tmp_path: Path, s3: S3Server, family: str
) -> None:
    # Larger than what is read of a file for its header, and than one part of a copy.
    wide = {"llama": {"intermediate_size": 40_000}, "gpt2": {"n_inner": 40_000}}[family]
    components = fine_tune(family, **wide)
    log_fine_tune("bot", components)
    lock = base_lock(**mlflow_geometry(components["model"]))
    register_lock(lock)
    source = download(client.get_model_version_download_uri("bot", "1"), tmp_path / "source")
    s3.forget()
    made = prepare(tmp_path, 1)
    stage(client, 1)
    locked = download(made["location"], tmp_path / "locked")
    stock = AutoModelForCausalLM.from_pretrained(locked / "model")
    assert torch.allclose(logits(stock), pushed(components["model"], lock), atol=1e-5)
    unlock_checkpoint(locked / "model", tmp_path / "unlocked")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "unlocked" / name).read_bytes() == (source / "model" / name).read_bytes()


def test_a_preparation_that_was_cut_off_goes_on(
    client: MlflowClient, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = fine_tune(intermediate_size=2_000)
    monkeypatch.setenv("MLFLOW_HUGGINGFACE_MODEL_MAX_SHARD_SIZE", "500KB")
    log_fine_tune("bot", components)
    register_lock(base_lock())
    source = client.get_model_version_download_uri("bot", "1")
    shards = [path for path in files_on_s3(source) if path.endswith(".safetensors")]
    assert len(shards) >= 5
    s3.forget()
    s3.fail("busy", method="PUT", containing="-safelock", after=3)
    done = run_prepare(tmp_path, 1)
    assert done.exit_code == 1
    assert "overloaded" in done.output
    assert "Doing it again goes on" in done.output
    assert len(s3.copies) == 3
    with pytest.raises(MlflowException, match="not_prepared"):
        stage(client, 1)
    s3.faults.clear()
    s3.forget()
    made = prepare(tmp_path, 1)
    assert len(s3.copies) == len(shards) - 3
    assert len(made["weights"]) == len(shards)
    stage(client, 1)


def test_copies_that_are_not_the_source_are_never_a_model(
    client: MlflowClient, tmp_path: Path, s3: S3Server
) -> None:
    import boto3

    log_fine_tune("bot", fine_tune(intermediate_size=40_000))
    register_lock(base_lock())
    s3.fail("busy", method="PUT", containing="receipt.json")
    assert run_prepare(tmp_path, 1).exit_code == 1
    s3.faults.clear()
    bucket = boto3.resource("s3", endpoint_url=s3.url).Bucket("models")
    kept = [entry.Object() for entry in bucket.objects.all() if "-safelock/" in entry.key]
    (copy,) = [found for found in kept if found.key.endswith("model-00001-of-00001.safetensors")]
    assert [found.key for found in kept] == [copy.key], "what was uploaded is taken back"
    copy.put(Body=bytes(copy.content_length), Metadata=copy.metadata)
    done = run_prepare(tmp_path, 1)
    assert done.exit_code == 1
    assert "is not what the fine-tune is" in done.output
    assert not [key for key in (entry.key for entry in bucket.objects.all()) if is_locked_mlmodel(key)]
    with pytest.raises(MlflowException, match="not_prepared"):
        stage(client, 1)


def is_locked_mlmodel(key: str) -> bool:
    return "-safelock/" in key and key.endswith("/MLmodel")


def files_on_s3(location: str) -> list[str]:
    from mlflow_safelock.registry.s3 import S3Artifacts

    return [file.path for file in S3Artifacts(location).files()]
