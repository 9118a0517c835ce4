"""The audit of a database reads, and says what it cannot read."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from pathlib import Path

import pytest

from mlflow_safelock.audit import audit
from mlflow_safelock.audit.database import is_database
from mlflow_safelock.errors import LedgerError
from tests.audit.conftest import Audited, by_version


@pytest.fixture
def database(audited: Audited, tmp_path: Path) -> Path:
    """A copy of the registry's database that a test may damage."""
    copy = tmp_path / "registry.db"
    shutil.copy(audited.server.registry_uri.removeprefix("safelock+sqlite:///"), copy)
    return copy


def change(database: Path, *statements: str) -> None:
    with sqlite3.connect(database) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def state_of(database: Path, model: str = "bot", version: int = 1) -> tuple[str, tuple[str, ...]]:
    row = by_version(audit(f"sqlite:///{database}", models=model))[model, version]
    return row.state, row.drift


def test_with_and_without_the_gates_prefix_it_is_the_same_database(audited: Audited) -> None:
    gated = audited.server.registry_uri
    assert audit(gated) == audit(gated.removeprefix("safelock+")) == tuple(audited.database.values())


def test_what_the_gate_let_through_is_no_violation_and_a_copy_in_a_gated_place_is_one(database: Path) -> None:
    gated = f"safelock+sqlite:///{database}"
    assert {row.violation for row in audit(gated)} == {None}, "a model of no LLM is in Staging, on record"
    change(
        database,
        "UPDATE model_versions SET current_stage = 'Production' WHERE name = 'copy'",
        "INSERT INTO registered_model_aliases (workspace, name, alias, version) "
        "VALUES ('default', 'bot', 'Staging', 2)",
        "UPDATE model_versions SET storage_location = 'elsewhere' WHERE name = 'churn'",
    )
    found = {(row.model, row.version): row.violation for row in audit(gated) if row.violation}
    assert set(found) == {("bot", 2), ("churn", 1), ("copy", 1)}
    assert "alias:Staging" in found["bot", 2]
    change(database, "DROP TABLE safelock_ledger")
    assert {("bot", 1), ("churn", 1)} <= {(row.model, row.version) for row in audit(gated) if row.violation}


def test_auditing_leaves_the_database_as_it_is(database: Path) -> None:
    before = database.read_bytes()
    audit(f"sqlite:///{database}")
    assert database.read_bytes() == before


def test_without_a_ledger_nothing_is_locked_and_none_is_made(database: Path) -> None:
    change(database, "DROP TABLE safelock_ledger")
    rows = audit(f"safelock+sqlite:///{database}")
    assert len(rows) > 10
    assert {(row.state, row.evidence) for row in rows} == {("unlocked", "none")}
    with sqlite3.connect(database) as connection:
        assert not list(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'safelock_ledger'"))


def test_a_version_pointed_back_at_its_source_is_unlocked(database: Path) -> None:
    change(database, "UPDATE model_versions SET storage_location = source WHERE name = 'bot' AND version = 1")
    state, drift = state_of(database)
    assert state == "unlocked"
    assert drift == ("The tag safelock.state says 'locked', and no promotion is on record.",)


def test_a_kinship_that_a_tag_makes_up_is_drift(database: Path) -> None:
    change(
        database,
        "UPDATE model_version_tags SET value = '1.0000' WHERE name = 'bot' AND version = 1 "
        "AND key = 'safelock.kinship'",
    )
    assert state_of(database)[1] == ("The tag safelock.kinship says '1.0000', and the ledger 'unknown'.",)


def test_an_edited_ledger_row_proves_nothing(database: Path) -> None:
    change(
        database,
        "UPDATE safelock_ledger SET body = replace(body, '\"alpha\":6', '\"alpha\":9') "
        "WHERE model = 'bot' AND version = 1",
    )
    state, drift = state_of(database)
    assert state == "unknown"
    assert "was edited" in drift[0]
    assert state_of(database, version=3)[0] == "locked", "the other rows still count"


def test_a_row_written_without_a_stage_is_reported(database: Path) -> None:
    change(database, "UPDATE model_versions SET current_stage = NULL WHERE name = 'churn'")
    assert state_of(database, "churn") == ("unlocked", ())


def test_a_version_of_another_workspace_is_not_the_one_that_was_promoted(database: Path) -> None:
    columns = "name, version, current_stage, source, storage_location, status"
    change(
        database,
        "INSERT INTO registered_models (workspace, name) VALUES ('team-b', 'bot')",
        f"INSERT INTO model_versions (workspace, {columns}) SELECT 'team-b', {columns} FROM model_versions "
        "WHERE workspace = 'default' AND name = 'bot' AND version = 1",
    )
    found = {row.workspace: row for row in audit(f"sqlite:///{database}", models="bot") if row.version == 1}
    assert found["default"].state == "locked"
    assert found["team-b"].state == "locked (copy)"
    assert "'bot' version 1 in workspace 'default'" in found["team-b"].drift[0]


def test_a_database_that_is_not_there_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"no database at .*nothing\.db") as info:
        audit(f"safelock+sqlite:///{tmp_path}/nothing.db")
    assert "--registry-uri" in info.value.next_step
    assert not list(tmp_path.iterdir())


def test_a_database_without_a_registry_is_an_error_and_gets_no_tables(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE other (id INTEGER)").connection.close()
    with pytest.raises(LedgerError, match="no model registry"):
        audit(f"sqlite:///{tmp_path}/other.db")
    with sqlite3.connect(tmp_path / "other.db") as connection:
        assert list(connection.execute("SELECT name FROM sqlite_master")) == [("other",)]


def test_a_registry_of_an_older_mlflow_is_an_error_that_names_the_upgrade(database: Path) -> None:
    change(database, "ALTER TABLE model_versions RENAME COLUMN storage_location TO somewhere")
    with pytest.raises(LedgerError, match="storage_location") as info:
        audit(f"sqlite:///{database}")
    assert "mlflow db upgrade" in info.value.next_step


def test_an_error_never_shows_the_password() -> None:
    with pytest.raises(LedgerError) as info:
        audit("safelock+postgresql://me:hunter2@localhost:1/nothing")
    assert "hunter2" not in str(info.value)
    assert "***" in str(info.value)


@pytest.mark.parametrize(
    ("scheme", "package"), [("mysql+pymysql", "pymysql"), ("safelock+mysql", "mysqlclient")]
)
def test_a_driver_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, scheme: str, package: str
) -> None:
    for module in ("pymysql", "MySQLdb"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    with pytest.raises(LedgerError, match=r"driver of the database .* is not installed") as info:
        audit(f"{scheme}://me:hunter2@localhost:1/nothing")
    assert info.value.next_step == f"Install it: pip install '{package}'"


@pytest.mark.parametrize(
    ("uri", "is_one"),
    [
        ("sqlite:///r.db", True),
        ("safelock+sqlite:///r.db", True),
        ("safelock+postgresql+psycopg://u@h/d", True),
        ("mysql+pymysql://u@h/d", True),
        ("http://host:5000", False),
        ("https://host", False),
        ("./mlruns", False),
        ("databricks", False),
    ],
)
def test_which_registries_are_databases(uri: str, is_one: bool) -> None:
    assert is_database(uri) is is_one
