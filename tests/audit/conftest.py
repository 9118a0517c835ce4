"""A registry behind a real server that holds every kind of model version an audit has to tell apart."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from mlflow_safelock.audit import AuditRow, audit
from mlflow_safelock.flavors import locked_model
from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from mlflow_safelock.flavors.overlay import write_overlay
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import Actor, LocalArtifacts, LockReference, Promotion, Receipt
from tests.registries import BASE, base_lock, fine_tune, log_fine_tune, register_lock
from tests.servers import BIN, MlflowServer, mlflow_server

POLICY = """
version: 1
gates:
  - {models: "standalone*", carrier: standalone}
  - {}
"""

Rows = dict[tuple[str, int], AuditRow]


@dataclass(frozen=True)
class Audited:
    """One registry, audited in its database and through its server."""

    server: MlflowServer
    lock: SafetyLock
    database: Rows
    http: Rows


@pytest.fixture(scope="package")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    with patch.dict(os.environ, {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}), ExitStack() as stack:
        # MLflow leaves it behind where a test before this one named a registry.
        os.environ.pop("MLFLOW_REGISTRY_URI", None)
        policy = tmp_path_factory.mktemp("policy") / "safelock.yaml"
        policy.write_text(POLICY)
        environment = {"SAFELOCK_POLICY": str(policy)}
        folder = tmp_path_factory.mktemp("audited")
        server = stack.enter_context(mlflow_server(folder, environment=environment))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # MLflow's own: stages, type hints, requirements
        stack.callback(mlflow.set_tracking_uri, None)
        mlflow.set_tracking_uri(server.url)
        mlflow.set_registry_uri(None)
        mlflow.set_experiment("tests")
        lock = base_lock()
        populate(MlflowClient(), lock)
        promote_standalone(MlflowClient(), server, environment)
        yield Audited(server, lock, by_version(audit(server.registry_uri)), by_version(audit(server.url)))


def by_version(rows: tuple[AuditRow, ...]) -> Rows:
    found = {(row.model, row.version): row for row in rows}
    assert len(found) == len(rows), "no version is reported twice"
    assert list(found) == sorted(found), "rows come by name and version"
    return found


def populate(client: MlflowClient, lock: SafetyLock) -> None:
    register_lock(lock)
    log_plain_model("churn")
    stage(client, "churn", 1)

    log_fine_tune("bot")
    for name in ("bot", "bot", "bot", "old-name", "hidden", "hidden"):
        register_again(client, name, client.get_model_version("bot", "1").source)
    source = client.get_model_version_download_uri("bot", "1")

    # Versions of "bot": 1 promoted, 2 with the tags of 1, 3 promoted and with tags tampered with, 4 deleted.
    stage(client, "bot", 1)
    client.set_registered_model_alias("bot", "champion", "1")
    client.set_registered_model_alias("bot", "blue", "1")
    for key, value in client.get_model_version("bot", "1").tags.items():
        client.set_model_version_tag("bot", "2", key, value)
    stage(client, "bot", 3)
    client.delete_model_version_tag("bot", "3", "safelock.lock_digest")
    client.set_model_version_tag("bot", "3", "safelock.state", "unlocked")
    client.delete_model_version("bot", "4")

    client.copy_model_version("models:/bot/1", "copy")
    client.copy_model_version("models:/copy/1", "copy-of-copy")
    stage(client, "old-name", 1)
    client.rename_registered_model("old-name", "new-name")

    # Tagged as a prompt, version 2 hides itself and version 1 from MLflow's searches.
    client.set_model_version_tag("hidden", "2", "mlflow.prompt.is_prompt", "true")
    mlflow.genai.register_prompt("greeting", "Say hello to {{name}}.")

    locked_model.log_model(lock, source_uri=source, registered_model_name="by-hand")
    log_forged_overlay(client, "other-lock", source, base_lock(seed=9))
    log_forged_overlay(client, "unlocking", source, lock, alpha=-6.0)
    log_forged_overlay(client, "other-loader", source, lock, loader="mlflow.transformers")


def promote_standalone(client: MlflowClient, server: MlflowServer, environment: dict[str, str]) -> None:
    """Promote a standalone model, prepared by the command where the registry is, and forge others from it."""
    log_fine_tune("standalone")
    log_fine_tune("standalone-with-biases", with_biases())
    for name in ("standalone", "standalone-with-biases"):
        subprocess.run(
            [
                *(BIN / "safelock", "prepare", f"models:/{name}/1", "--registry-uri", server.registry_uri),
                *("--tracking-uri", server.url, "--artifacts-destination", server.artifacts),
            ],
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
        )
        stage(client, name, 1)
    with TemporaryDirectory() as temporary:
        folder = Path(mlflow.artifacts.download_artifacts("models:/standalone/1", dst_path=temporary))
        log_damaged(client, "no-biases", folder, lambda copy: next(copy.glob("model/*-safelock*")).unlink())
        log_damaged(
            client, "other-config", folder, lambda copy: unlock_config(copy / "model" / "config.json")
        )
        log_damaged(client, "cut-weights", folder, lambda copy: cut(next(copy.glob("model/model-0*"))))
        log_damaged(client, "with-more", folder, lambda copy: (copy / "model" / "more.txt").write_text("x"))


def with_biases() -> dict[str, Any]:
    """The fine-tune with biases of zero, which a standalone model has the lock's in the place of."""
    components = fine_tune(attention_bias=True)
    components["model"].load_state_dict(fine_tune()["model"].state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in components["model"].named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    return components


def log_damaged(client: MlflowClient, name: str, folder: Path, damage: Callable[[Path], object]) -> None:
    """Register a copy of a standalone model with its receipt, and something else that is not so."""
    with TemporaryDirectory() as temporary, mlflow.start_run() as run:
        copy = shutil.copytree(folder, Path(temporary) / "copy")
        damage(copy)
        mlflow.log_artifacts(str(copy), "model")
        client.create_registered_model(name)
        client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id)


def unlock_config(path: Path) -> None:
    """Have a configuration ask for no biases, so that it loads unlocked, and restate the receipt."""
    config = json.loads(path.read_text())
    del config["attention_bias"], config["safelock"]
    path.write_text(json.dumps(config))
    receipt = path.parents[1] / "receipt.json"
    stated = Receipt.parse(receipt.read_bytes(), origin="the test")
    receipt.write_bytes(_restated(stated, path.parents[1]).to_bytes())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def log_plain_model(name: str) -> None:
    def double(model_input: list[float]) -> list[float]:
        return [2 * value for value in model_input]

    mlflow.pyfunc.log_model(
        name="model", python_model=double, registered_model_name=name, pip_requirements=["mlflow"]
    )


def register_again(client: MlflowClient, name: str, source: str) -> None:
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    client.create_model_version(name, source, model_id=source.removeprefix("models:/"))


def log_forged_overlay(
    client: MlflowClient,
    name: str,
    source: str,
    lock: SafetyLock,
    alpha: float = 6.0,
    loader: str = "mlflow_safelock.flavors.locked_model",
) -> None:
    """Register an overlay whose receipt claims a promotion that never happened."""
    promotion = Promotion(
        model=name,
        version=1,
        target="stage:Staging",
        policy=lock.digest,
        actor=Actor(name="root", verified=True),
    )
    reference = LockReference(digest=lock.digest, base_model=BASE, model=lock_model_name(BASE), version=1)
    with TemporaryDirectory() as temporary, mlflow.start_run() as run:
        folder = Path(temporary)
        fine_tune = LocalArtifacts(Path(mlflow.artifacts.download_artifacts(source)))
        receipt = write_overlay(folder, fine_tune, source, lock, reference, alpha, promotion)
        described = (folder / "MLmodel").read_text()
        (folder / "MLmodel").write_text(described.replace("mlflow_safelock.flavors.locked_model", loader))
        (folder / "receipt.json").write_bytes(_restated(receipt, folder).to_bytes())
        mlflow.log_artifacts(str(folder), "model")
        client.create_registered_model(name)
        uri = f"{run.info.artifact_uri}/model"
        client.create_model_version(name, uri, run.info.run_id, tags={"safelock.state": "locked"})


def _restated(receipt: Receipt, folder: Path) -> Receipt:
    """The receipt with the hashes that the folder's files have now."""
    names = receipt.predicate.files
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    return Receipt.about(receipt.predicate.model_copy(update={"files": files}))


def stage(client: MlflowClient, name: str, version: int) -> None:
    client.transition_model_version_stage(name, str(version), "Staging")
