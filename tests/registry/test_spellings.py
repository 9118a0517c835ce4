"""A database that takes BOT for bot (MySQL's do) lets nothing past a glob: here sqlite with such columns."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_safelock.audit import audit
from tests.registries import base_lock, log_fine_tune, register_lock
from tests.registry.test_guard import edit_row, store_of
from tests.registry.test_promotion import ledger_rows, open_with_policy, stage

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

NAMES = "name VARCHAR(256) NOT NULL"


@pytest.fixture
def gated(client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A client of a registry in which spellings of a name are one, with a gate for the model "bot" alone."""
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        connection.execute("PRAGMA writable_schema = ON")
        changed = connection.execute(
            "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE sql LIKE ?",
            (NAMES, f"{NAMES} COLLATE NOCASE", f"%{NAMES}%"),
        )
        assert changed.rowcount >= 5, "models, versions, aliases, and the tags of models and versions"
    connection.close()
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        connection.execute("REINDEX")
    connection.close()
    policy = "version: 1\ngates: [{models: bot}, {models: 'safelock.*'}]\n"
    gated = open_with_policy(tmp_path, monkeypatch, policy)
    assert log_fine_tune("bot") == 1
    return gated


def test_another_spelling_is_gated_like_the_name(gated: MlflowClient, tmp_path: Path) -> None:
    for refused in (
        lambda: stage(gated, 1, "BOT"),
        lambda: gated.set_registered_model_alias("Bot", "champion", "1"),
    ):
        with pytest.raises(MlflowException, match="missing_lock"):
            refused()
    found = gated.get_model_version("bot", "1")
    assert (found.current_stage, found.aliases) == ("None", [])
    edit_row(tmp_path, "UPDATE model_versions SET current_stage='Staging' WHERE name='bot'")
    with pytest.raises(MlflowException, match="not_locked"):
        gated.get_model_version_download_uri("boT", "1")
    register_lock(base_lock())
    stage(gated, 1, "bOT")
    assert "-safelock/" in gated.get_model_version_download_uri("BOT", "1")
    assert {row["model"] for row in ledger_rows(tmp_path)} == {"bot"}
    gated.transition_model_version_stage("BOT", "1", "None")
    store_of(gated).unlock("BOT", 1, "to retrain it")
    assert {row["model"] for row in ledger_rows(tmp_path)} == {"bot"}


def test_a_version_that_was_registered_by_another_spelling_is_gated_and_audited(
    gated: MlflowClient, tmp_path: Path
) -> None:
    source = gated.get_model_version("bot", "1").source
    gated.create_model_version("BOT", source, model_id=source.removeprefix("models:/"))
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        rows = connection.execute("SELECT name FROM model_versions WHERE version = 2").fetchall()
    connection.close()
    assert rows == [("BOT",)], "MLflow keeps the spelling that a version was registered by"
    with pytest.raises(MlflowException, match="missing_lock"):
        stage(gated, 2, "bot")
    stock = MlflowClient(mlflow.get_tracking_uri(), f"sqlite:///{tmp_path}/registry.db")
    stock.set_registered_model_alias("BoT", "champion", "2")
    with pytest.raises(MlflowException, match="not_locked"):
        gated.get_model_version_download_uri("BOT", "2")
    (row,) = (row for row in audit(f"safelock+sqlite:///{tmp_path}/registry.db") if row.version == 2)
    assert (row.model, row.aliases) == ("bot", ("champion",))
    assert row.violation is not None
    assert "alias:champion" in row.violation
