"""``GET /safelock/health`` of real servers: 200 only where the registry is really guarded."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
import sqlalchemy as sa
from mlflow import MlflowClient

from mlflow_safelock.gate.ledger import verify_chain
from mlflow_safelock.gate.policy import DEFAULT_POLICY
from tests.operations.rivals import rival_package
from tests.registries import base_lock, fine_tune, log_fine_tune, register_lock
from tests.servers import MlflowServer, mlflow_server, postgresql

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

APP = ("--app-name", "safelock")


def health(server: MlflowServer, **options: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    """Status and the checks by name."""
    answer = requests.get(f"{server.url}/safelock/health", timeout=60, **options)
    body = answer.json()
    assert body["status"] == ("ok" if answer.status_code == 200 else "fault")
    return answer.status_code, {check["check"]: check for check in body["checks"]}


def faults(checks: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, check in checks.items() if check["status"] == "fault"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("policy") / "safelock.yaml"
    file.write_text("version: 1\ngates: [{}]\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, policy: Path) -> Iterator[MlflowServer]:
    with mlflow_server(
        tmp_path_factory.mktemp("server"), arguments=APP, environment={"SAFELOCK_POLICY": str(policy)}
    ) as running:
        yield running


def database(server: MlflowServer) -> Path:
    return Path(server.registry_uri.removeprefix("safelock+sqlite:///"))


def test_a_guarded_server_is_healthy_and_says_what_is_in_force(server: MlflowServer) -> None:
    status, checks = health(server)
    assert status == 200, checks
    assert checks.keys() == {"registry", "policy", "database", "ledger", "artifacts"}
    assert {check["status"] for check in checks.values()} == {"ok"}
    assert checks["registry"]["facts"] == {"store": "SafelockStore"}
    assert checks["policy"]["facts"] == {"digest": DEFAULT_POLICY.digest, "is_newest": True}
    engine = sa.create_engine(f"sqlite:///{database(server)}")
    with engine.connect() as connection:
        chain = verify_chain(connection)
    assert checks["ledger"]["facts"] == {"rows": chain.rows, "head": chain.head}


def test_the_rest_of_mlflow_is_as_it_was_and_still_gated(
    server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert requests.get(f"{server.url}/health", timeout=60).text == "OK"
    assert requests.get(f"{server.url}/version", timeout=60).text == mlflow.__version__
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    mlflow.set_tracking_uri(server.url)
    mlflow.set_registry_uri(server.url)
    try:
        mlflow.set_experiment("tests")
        version = str(log_fine_tune("bot", fine_tune(base="org/health")))
        client = MlflowClient(server.url)
        with pytest.raises(mlflow.MlflowException, match="missing_lock"):
            client.transition_model_version_stage("bot", version, "Staging")
        register_lock(base_lock(base="org/health"))
        before = health(server)[1]["ledger"]["facts"]
        client.transition_model_version_stage("bot", version, "Staging")
        after = health(server)[1]["ledger"]["facts"]
        assert after["rows"] == before["rows"] + 1
        assert after["head"] != before["head"]
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)


def test_a_policy_that_broke_is_told_while_the_old_one_is_in_force(
    server: MlflowServer, policy: Path
) -> None:
    sound = policy.read_text(encoding="utf-8")
    policy.write_text("version: 1\ngates: [{secret-key: hunter2}]\n", encoding="utf-8")
    try:
        status, checks = health(server)
        assert (status, faults(checks)) == (503, {"policy"})
        assert checks["policy"]["facts"] == {"digest": DEFAULT_POLICY.digest, "is_newest": False}
        assert "safelock policy check" in checks["policy"]["next_step"]
        assert "hunter2" not in str(checks)
        policy.unlink()
        assert health(server)[0] == 503, "a policy that is gone is not in force by its own will either"
    finally:
        policy.write_text(sound, encoding="utf-8")
    assert health(server)[0] == 200


def test_a_ledger_that_lost_rows_or_is_gone_is_a_fault(server: MlflowServer) -> None:
    with sqlite3.connect(database(server)) as connection:
        connection.execute("CREATE TABLE kept AS SELECT * FROM safelock_ledger")
        connection.execute("INSERT INTO safelock_ledger SELECT sequence + 5, workspace, event, model, "
                           "version, location_key, previous, digest, body FROM kept LIMIT 1")  # fmt: skip
    try:
        status, checks = health(server)
        assert (status, faults(checks)) == (503, {"ledger"})
        assert "rows were removed" in checks["ledger"]["message"]
        with sqlite3.connect(database(server)) as connection:
            connection.execute("ALTER TABLE safelock_ledger RENAME TO hidden")
        status, checks = health(server)
        assert (status, faults(checks)) == (503, {"ledger"})
        assert "no table safelock_ledger" in checks["ledger"]["message"]
    finally:
        with sqlite3.connect(database(server)) as connection:
            connection.execute("ALTER TABLE hidden RENAME TO safelock_ledger")
            connection.execute(
                "DELETE FROM safelock_ledger WHERE sequence > (SELECT max(sequence) FROM kept)"
            )
            connection.execute("DROP TABLE kept")
    assert health(server)[0] == 200


def test_a_destination_that_cannot_be_written_is_a_fault(server: MlflowServer) -> None:
    aside = server.artifacts.with_name("aside")
    server.artifacts.mkdir(exist_ok=True)
    server.artifacts.rename(aside)
    server.artifacts.write_text("a file in its place", encoding="utf-8")
    try:
        status, checks = health(server)
        assert (status, faults(checks)) == (503, {"artifacts"})
    finally:
        server.artifacts.unlink()
        shutil.move(aside, server.artifacts)
    assert health(server)[0] == 200


def test_a_server_without_the_gate_says_so(tmp_path: Path) -> None:
    with mlflow_server(tmp_path, registry_uri=f"sqlite:///{tmp_path}/r.db", arguments=APP) as plain:
        status, checks = health(plain)
        assert status == 503
        assert "registry" in faults(checks)
        assert "has no gate in front" in checks["registry"]["message"]
        assert checks["registry"]["facts"]["store"].endswith("SqlAlchemyStore")
        assert "safelock+sqlite" in checks["registry"]["next_step"]
        assert "safelock: The registry" in plain.log.read_text(), "it is also in the log, at the start"


def test_a_scheme_that_another_package_claims_is_a_fault_and_a_line_in_the_log(tmp_path: Path) -> None:
    path = rival_package(tmp_path / "rival", "safelock+sqlite")
    with mlflow_server(tmp_path / "server", arguments=APP, environment={"PYTHONPATH": path}) as rivalled:
        status, checks = health(rivalled)
        assert status == 503
        assert "also claimed by rival-store" in checks["registry"]["message"]
        assert "also claimed by rival-store" in rivalled.log.read_text()


def test_under_gunicorn_it_is_a_flask_app(tmp_path: Path) -> None:
    with mlflow_server(tmp_path, arguments=(*APP, "--gunicorn-opts", "--log-level warning")) as running:
        assert health(running)[0] == 200
        assert requests.get(f"{running.url}/version", timeout=60).text == mlflow.__version__


def test_mlflows_authentication_is_in_front_when_it_is_asked_for(tmp_path: Path) -> None:
    password = "a-long-enough-password"
    environment = {
        "SAFELOCK_AUTH": "basic-auth",
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "static-for-all-workers",
    }
    with mlflow_server(tmp_path, arguments=APP, environment=environment) as running:
        for path in ("/safelock/health", "/api/2.0/mlflow/registered-models/search"):
            url = f"{running.url}{path}"
            assert requests.get(url, timeout=60).status_code == 401
            assert requests.get(url, auth=("admin", "wrong"), timeout=60).status_code == 401
            assert requests.get(url, auth=("admin", password), timeout=60).status_code == 200


def test_a_database_that_is_gone_is_told_in_time_and_without_its_password(tmp_path: Path) -> None:
    stopped = threading.Event()
    with postgresql(tmp_path / "database") as uri:
        registry = f"safelock+{uri.replace('postgres:@', 'postgres:hunter2@', 1)}"
        assert "hunter2" in registry
        running = mlflow_server(tmp_path / "server", registry_uri=registry, arguments=APP)
        server = running.__enter__()
        try:
            assert health(server)[0] == 200
        except BaseException:
            running.__exit__(None, None, None)
            raise
    stopped.set()
    try:
        status, checks = health(server)
        assert status == 503
        assert {"database", "ledger"} <= faults(checks)
        assert "hunter2" not in str(checks)
        assert str(tmp_path / "database") not in str(checks)
    finally:
        running.__exit__(None, None, None)
