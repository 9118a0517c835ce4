"""The companion of a stock server: what stock clients set past the gate is locked, or taken out again."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from cryptography.fernet import Fernet
from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlflow_safelock.gate.leases import Work
from mlflow_safelock.gate.reconciling import Repair, Way
from mlflow_safelock.operations.reconciliation import repairing
from mlflow_safelock.operations.watching import Watcher
from mlflow_safelock.registry.artifacts import RegistryArtifacts
from mlflow_safelock.registry.sql import SqlRegistry
from mlflow_safelock.registry.stores import open_store
from tests.operations.test_deliveries import BODY, signed
from tests.registries import base_lock, biases_of, fine_tune, log_fine_tune, register_lock
from tests.registry.test_promotion import ledger_rows
from tests.servers import BIN, MlflowServer, mlflow_server

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

WEBHOOKS = {
    "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
    # A real one listens behind TLS, at a public address.
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
    "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A stock MLflow server with two fine-tunes: "bot" has a lock for its base, "nobodys" has none."""
    folder = tmp_path_factory.mktemp("stock")
    with mlflow_server(
        folder, registry_uri=f"sqlite:///{folder}/registry.db", environment=WEBHOOKS
    ) as running:
        before = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
        mlflow.set_tracking_uri(running.url)
        mlflow.set_registry_uri(running.url)
        mlflow.set_experiment("tests")
        log_fine_tune("bot")
        log_fine_tune("nobodys", fine_tune(base="org/nobody"))
        register_lock(base_lock())
        yield running
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@dataclass(frozen=True)
class Running:
    """A watcher that runs as a process of its own."""

    process: subprocess.Popen[bytes]
    out: Path
    log: Path

    @property
    def told(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]


@contextmanager
def watcher(
    server: MlflowServer, folder: Path, *options: str, environment: dict[str, str] | None = None
) -> Iterator[Running]:
    """Run ``safelock reconcile --watch`` against a server's own database; it has begun."""
    out, log = folder / "out", folder / "log"
    command = [
        *(str(BIN / "safelock"), "reconcile", "--watch", "--format", "json", *options),
        *("--registry-uri", f"safelock+{server.registry_uri}", "--tracking-uri", server.url),
        *("--artifacts-destination", str(server.artifacts)),
    ]
    settings = {**os.environ, "SAFELOCK_POLICY": "", **(environment or {})}
    settings = {name: value for name, value in settings.items() if value or name != "SAFELOCK_POLICY"}
    with out.open("wb") as stdout, log.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=settings)
    try:
        until(lambda: "Watching" in log.read_text(), process, log)
        yield Running(process, out, log)
    finally:
        process.kill()
        process.wait()


def until(
    holds: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 120
) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def test_a_webhook_has_what_stock_clients_set_locked_or_taken_out_and_sigterm_waits_for_the_pass(
    server: MlflowServer, tmp_path: Path
) -> None:
    client = MlflowClient(server.url, server.url)
    source = client.get_model_version("bot", "1").source
    secret = {"SAFELOCK_WEBHOOK_SECRET": "a secret that both know"}
    options = ("--interval", "3600", "--listen", "127.0.0.1:0", "--lock", "--demote")
    with watcher(server, tmp_path, *options, environment=secret) as running:
        found = re.search(r"Listening at (\S+)", running.log.read_text())
        assert found
        url = f"http://{found[1]}/"
        client.create_webhook(
            "safelock", url, ["model_version_alias.created"], secret=next(iter(secret.values()))
        )
        # No webhook is for a stage, so it waits for the next pass, whatever begins that.
        client.transition_model_version_stage("bot", "1", "Staging")
        client.set_registered_model_alias("nobodys", "champion", "1")
        until(lambda: len(running.told) == 2, running.process, running.log)
        done = {line["model"]: line["done"] for line in running.told}
        assert done == {"bot": "locked", "nobodys": "taken out"}
        assert client.get_model_version("nobodys", "1").aliases == []
        assert biases_of(mlflow.pyfunc.load_model("models:/bot/Staging")._model_impl.pipeline.model)
        check_folders_through_the_server(client, tmp_path / "log")

        for headers in ({}, signed("another secret"), signed(next(iter(secret.values())), age=301)):
            assert requests.post(url, data=BODY, headers=headers, timeout=30).status_code == 401
        again = signed(next(iter(secret.values())))
        answers = [requests.post(url, data=BODY, headers=again, timeout=30).status_code for _ in range(2)]
        assert answers == [202, 200]
        assert requests.get(url, timeout=30).status_code == 405
        assert requests.post(url, data=b" " * (2 << 20), timeout=30).status_code == 413

        # Somebody is at work on a version, so the pass waits for them, and the end for the pass.
        model_id = source.rpartition("/")[2]
        quick, slow = (
            client.create_model_version("bot", source, run_id=None, model_id=model_id) for _ in range(2)
        )
        registry = SqlRegistry(open_store(f"safelock+{server.registry_uri}", server.url))
        with registry.lease(Work("default", "bot", int(slow.version))):
            client.transition_model_version_stage("bot", slow.version, "Production")
            client.set_registered_model_alias("bot", "champion", quick.version)
            until(lambda: len(running.told) == 3, running.process, running.log)
            running.process.send_signal(signal.SIGTERM)
            time.sleep(1)
            assert running.process.poll() is None
        assert running.process.wait(timeout=60) == 0
        assert [(line["version"], line["done"]) for line in running.told][2:] == [
            (2, "locked"),
            (3, "locked"),
        ]
        assert "Stopped." in running.log.read_text()
    assert "Traceback" not in running.log.read_text()


def check_folders_through_the_server(client: MlflowClient, file: Path) -> None:
    """What a sweep sees and deletes where the artifacts are only reached through the server."""
    artifacts = RegistryArtifacts()
    original = client.get_model_version_download_uri("nobodys", "1")
    assert original.startswith("mlflow-artifacts:/")
    assert artifacts.locked_folders(original) == ()
    location = client.get_model_version_download_uri("bot", "1")
    (folder,) = artifacts.locked_folders(location.partition("-safelock/")[0])
    assert (folder.location, folder.is_complete) == (location, True)
    assert folder.size > 1000
    copy = f"{location.rpartition('/')[0]}/{32 * '0'}"
    get_artifact_repository(copy).log_artifact(str(file))
    artifacts.delete_locked_folder(copy)
    assert artifacts.locked_folders(location.partition("-safelock/")[0]) == (folder,)


@dataclass
class Told:
    """A watcher in a thread of this process, and what it told."""

    watcher: Watcher
    repairs: list[Repair]

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.repairs) < count:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@contextmanager
def watching(folder: Path, *ways: Way, interval: float = 0.1) -> Iterator[Told]:
    registry = f"safelock+sqlite:///{folder}/registry.db"
    reconciliation = repairing(open_store(registry, f"sqlite:///{folder}/tracking.db"), registry, None)
    told: list[Repair] = []
    watcher = Watcher(reconciliation, ways, interval, told.append)
    thread = threading.Thread(target=watcher.run)
    thread.start()
    try:
        yield Told(watcher, told)
    finally:
        watcher.stop()
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_polling_tells_once_what_is_left_and_goes_on_after_a_pass_that_failed(
    client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_fine_tune("bot")
    stock = MlflowClient(f"sqlite:///{tmp_path}/tracking.db", f"sqlite:///{tmp_path}/registry.db")
    stock.set_registered_model_alias("bot", "champion", "1")
    with watching(tmp_path, "lock") as told:
        told.wait_for(1)
        with sqlite3.connect(tmp_path / "registry.db") as connection:
            connection.execute("ALTER TABLE model_versions RENAME TO elsewhere")
        deadline = time.monotonic() + 30
        while "This pass ended early" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with sqlite3.connect(tmp_path / "registry.db") as connection:
            connection.execute("ALTER TABLE elsewhere RENAME TO model_versions")
        time.sleep(1)
        assert [repair.refusal.reason for repair in told.repairs if repair.refusal] == ["missing_lock"]
        assert len(told.repairs) == 1
        assert ledger_rows(tmp_path) == [], "a refusal in every pass does not fill the ledger"
        register_lock(base_lock())
        told.wait_for(2)
        assert told.repairs[1].done == "locked"
        stock.set_registered_model_alias("bot", "staging", "1")
        time.sleep(0.5)
        assert len(told.repairs) == 2, "it is locked already"


def test_it_waits_for_the_interval_unless_it_is_woken(client: MlflowClient, tmp_path: Path) -> None:
    log_fine_tune("bot")
    stock = MlflowClient(f"sqlite:///{tmp_path}/tracking.db", f"sqlite:///{tmp_path}/registry.db")
    with watching(tmp_path, "demote", interval=3600) as told:
        time.sleep(1)
        stock.set_registered_model_alias("bot", "champion", "1")
        time.sleep(0.5)
        assert told.repairs == []
        told.watcher.wake()
        told.wait_for(1)
    assert stock.get_model_version("bot", "1").aliases == []
