"""``safelock audit``: a table for people, JSON for programs."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import mlflow
import pytest
from mlflow import MlflowClient

from mlflow_safelock.audit import audit
from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from mlflow_safelock.lock import SafetyLock
from tests.cli.conftest import Run
from tests.registries import BASE, base_lock, log_fine_tune, register_lock
from tests.servers import BIN

OTHER = "other\x1b[31m[bot]"

FIELDS = {
    *(
        "workspace",
        "model",
        "version",
        "stage",
        "aliases",
        "state",
        "lock_name",
        "lock_version",
        "lock_digest",
    ),
    *("base_model", "alpha", "when", "by", "by_verified", "evidence", "drift", "violation"),
    "lock_faults",
    "own_biases",
}


def dated_lock() -> SafetyLock:
    lock = base_lock()
    metadata = lock.metadata.model_copy(update={"created": "2026-01-01T00:00:00+00:00"})
    return SafetyLock(lock.heads, metadata, lock.scores)


@pytest.fixture(scope="module")
def registry(empty_databases: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The database of a registry with a locked version and one that only its tags call locked."""
    folder = tmp_path_factory.mktemp("registry")
    shutil.copytree(empty_databases, folder, dirs_exist_ok=True)
    with patch.dict(os.environ):  # MLflow puts the registry there
        mlflow.set_tracking_uri(f"sqlite:///{folder}/tracking.db")
        mlflow.set_registry_uri(f"safelock+sqlite:///{folder}/registry.db")
        mlflow.set_experiment(experiment_id=mlflow.create_experiment("tests", str(folder / "artifacts")))
        client = MlflowClient()
        register_lock(dated_lock())
        log_fine_tune("bot")
        source = client.get_model_version_download_uri("bot", "1")
        client.create_registered_model("other\x1b[31m[bot]")
        client.create_model_version("other\x1b[31m[bot]", source, tags={"safelock.state": "locked"})
        client.set_registered_model_alias("bot", "champion", "1")
    return f"sqlite:///{folder}/registry.db"


def test_json_is_the_rows_of_the_library(run: Run, registry: str) -> None:
    done = run("audit", "--registry-uri", registry, "--format", "json")
    assert done.exit_code == 0
    assert done.json == json.loads(json.dumps([asdict(row) for row in audit(registry)]))
    assert [set(row) for row in done.json] == [FIELDS, FIELDS]
    assert [(row["model"], row["state"]) for row in done.json] == [
        ("bot", "locked"),
        ("other\x1b[31m[bot]", "unlocked"),
    ]


def test_the_table_shows_versions_locks_and_drift(run: Run, registry: str) -> None:
    lines = run("audit", "--registry-uri", f"safelock+{registry}").stdout.splitlines()
    (locked,) = (line for line in lines if line.startswith("bot "))
    digest = dated_lock().digest.removeprefix("sha256:")[:12]
    for told in ("champion", "locked", "safelock.org--tiny-base v1", digest, " 6 ", "(claimed)", "ledger"):
        assert told in locked
    other = "other\\x1b[31m[bot]"
    assert any(line.startswith(other) and "unlocked" in line for line in lines), (
        "no control character gets out"
    )
    assert f"{other} version 1: The tag safelock.state says 'locked', and no promotion is on record." in lines
    assert lines[-1] == "1 locked, 1 unlocked"


@pytest.mark.parametrize("told", ["scheme", "policy"])
def test_an_unlocked_version_in_a_gated_place_is_a_violation_and_exit_code_3(
    run: Run, registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    copy = tmp_path / "copy.db"
    shutil.copy(registry.removeprefix("sqlite:///"), copy)
    with sqlite3.connect(copy) as connection:
        connection.execute("UPDATE model_versions SET current_stage = 'Staging'")
    connection.close()
    assert run("audit", "--registry-uri", f"sqlite:///{copy}").exit_code == 0, "nothing says that it is gated"
    scheme = "sqlite"
    if told == "scheme":
        scheme = "safelock+sqlite"
    else:
        policy = tmp_path / "safelock.yaml"
        policy.write_text("version: 1\ngates: [{}]\n")
        monkeypatch.setenv("SAFELOCK_POLICY", str(policy))
    uri = ("--registry-uri", f"{scheme}:///{copy}")
    why = "It is in stage:Staging, and what it serves did not pass the gate: "
    why += "the ledger knows no promotion of it."
    done = run("audit", *uri, "--format", "json")
    assert done.exit_code == 3
    assert [(row["model"], row["violation"]) for row in done.json] == [
        ("bot", None),
        ("other\x1b[31m[bot]", why),
    ]
    table = run("audit", *uri)
    assert table.exit_code == 3
    assert f"other\\x1b[31m[bot] version 1: {why}" in table.stdout.splitlines()
    assert "Error: 1 model version(s)" in table.stderr
    assert "Next: " in table.stderr
    assert run("audit", *uri, "--model", "bot").exit_code == 0


def test_who_runs_a_lock_that_would_not_be_applied_today_is_listed_with_exit_code_3(
    run: Run, registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.db"
    shutil.copy(registry.removeprefix("sqlite:///"), copy)
    uri = ("--registry-uri", f"safelock+sqlite:///{copy}")
    lock = lock_model_name(BASE)
    assert run("audit", *uri).exit_code == 0
    assert run("lock", "revoke", f"models:/{lock}/1", "--reason", "it leaked", *uri).exit_code == 0
    policy = tmp_path / "safelock.yaml"
    policy.write_text("version: 1\ngates: [{lock: {min_version: 2, max_age_days: 30}}]\n")
    monkeypatch.setenv("SAFELOCK_POLICY", str(policy))
    done = run("audit", *uri, "--format", "json")
    assert done.exit_code == 3
    assert [(row["model"], row["violation"]) for row in done.json] == [("bot", None), (OTHER, None)]
    revoked, too_low, too_old = done.json[0]["lock_faults"]
    assert done.json[1]["lock_faults"] == [], "it is in no gated place, and runs none"
    assert revoked.startswith(f"It runs lock {lock} version 1, which was revoked at 2")
    assert revoked.endswith(": it leaked")
    assert too_low == f"It runs lock {lock} version 1, and the policy asks for version 2 or later."
    assert too_old == (
        f"It runs lock {lock} version 1, which was made 2026-01-01T00:00:00+00:00, and the policy takes none "
        "older than 30 days."
    )
    table = run("audit", *uri)
    assert {f"bot version 1: {fault}" for fault in (revoked, too_low, too_old)} <= set(
        table.stdout.splitlines()
    )
    assert "Error: 1 model version(s) run a lock that would not be applied today." in table.stderr

    policy.write_text("version: 1\ngates: [{lock: {max_age_days: 30}}]\n")
    with sqlite3.connect(copy) as connection:
        connection.execute("UPDATE model_versions SET storage_location = '/gone' WHERE name = ?", (lock,))
    connection.close()
    faults = run("audit", *uri, "--model", "bot", "--format", "json").json[0]["lock_faults"]
    assert any("whether that is too old cannot be told: The lock at /gone" in fault for fault in faults)


def test_a_pattern_narrows_it_and_an_empty_answer_is_said(run: Run, registry: str) -> None:
    uri = ("--registry-uri", registry)
    narrowed = run("audit", *uri, "--model", "bo*", "--format", "json").json
    assert [row["model"] for row in narrowed] == ["bot"]
    assert run("audit", *uri, "--model", "nothing*", "--format", "json").json == []
    assert run("audit", *uri, "--model", "nothing*").stdout == "No model is like nothing*.\n"


def test_the_registry_comes_from_mlflow_s_variables_too(
    run: Run, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry)
    assert len(run("audit", "--format", "json").json) == 2


def test_a_registry_that_is_not_there_is_an_error(run: Run, tmp_path: Path) -> None:
    done = run("audit", "--registry-uri", f"sqlite:///{tmp_path}/nothing.db")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "Error: There is no database at" in done.stderr
    assert "Next: Name the registry" in done.stderr
    assert not (tmp_path / "nothing.db").exists()


def test_a_server_that_does_not_answer_is_an_error_at_once_without_a_traceback(run: Run) -> None:
    started = time.monotonic()
    done = run("audit", "--tracking-uri", "http://127.0.0.1:1")
    assert time.monotonic() - started < 60, "MLflow alone tries for more than 100 seconds"
    assert (done.exit_code, done.stdout) == (1, "")
    error, next_step = done.stderr.splitlines()[-2:]
    assert error.startswith("Error: The MLflow server http://127.0.0.1:1 does not answer")
    assert next_step.startswith("Next: Check the address")
    assert "Traceback" not in done.stderr


def test_piped_from_the_installed_script_it_is_json_and_nothing_else(registry: str) -> None:
    done = subprocess.run(
        [BIN / "safelock", "audit", "--registry-uri", registry, "--format", "json"],
        env={**os.environ, "FORCE_COLOR": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [row["state"] for row in json.loads(done.stdout)] == ["locked", "unlocked"]
    assert "\x1b" not in done.stdout
