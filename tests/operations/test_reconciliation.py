"""Passes over a registry on PostgreSQL, and over one with workspaces."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import mlflow
import pytest
import sqlalchemy as sa
from mlflow import MlflowClient
from mlflow.utils.workspace_context import WorkspaceContext

from mlflow_safelock.cli.repairs import facts_of
from mlflow_safelock.gate import ledger
from mlflow_safelock.gate.approval import Request
from mlflow_safelock.gate.policy import DEFAULT_POLICY
from mlflow_safelock.gate.ports import Target, Withdrawal
from mlflow_safelock.gate.promotion_rows import reconciled_entry
from mlflow_safelock.gate.reconciling import Difference, Reconciling, Way
from mlflow_safelock.operations.reconciliation import Reconciliation, repairing
from mlflow_safelock.provenance import Actor, LocalArtifacts, contents_of
from mlflow_safelock.registry.stores import open_store
from tests.registries import base_lock, biases_of, log_fine_tune, register_lock
from tests.registry.test_guard import edit_row
from tests.servers import postgresql

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("SAFELOCK_POLICY", raising=False)
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ):
        yield tmp_path
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)


def use(tracking: str, registry: str) -> tuple[MlflowClient, Reconciliation]:
    """The stock client of a registry, and what reconciles it."""
    stock = registry.removeprefix("safelock+")
    mlflow.set_tracking_uri(tracking)
    mlflow.set_registry_uri(stock)
    return MlflowClient(tracking, stock), repairing(open_store(registry, tracking), registry, None)


def test_on_postgresql_a_registry_that_only_stock_clients_use_is_put_right(places: Path) -> None:
    tracking = f"sqlite:///{places}/tracking.db"
    with postgresql(places / "database") as uri:
        stock, reconciliation = use(tracking, f"safelock+{uri}")
        mlflow.set_experiment("tests")
        log_fine_tune("bot")
        source = stock.get_model_version("bot", "1").source
        original = stock.get_model_version_download_uri("bot", "1")
        stock.create_model_version("bot", source, tags={"safelock.alpha": "99"})
        register_lock(base_lock())
        stock.transition_model_version_stage("bot", "1", "Staging")
        stock.set_registered_model_alias("bot", "champion", "2")

        def done(*ways: Way) -> dict[int, str | None]:
            repairs = reconciliation.repairs(ways)
            return {repair.difference.request.version: repair.done for repair in repairs}

        assert done() == {1: None, 2: None}
        assert done("lock") == {1: "locked", 2: None}
        assert done("lock", "demote") == {2: "taken out"}
        assert stock.get_model_version("bot", "2").aliases == []
        location = stock.get_model_version_download_uri("bot", "1")
        assert biases_of(mlflow.pyfunc.load_model("models:/bot/Staging")._model_impl.pipeline.model)

        engine = sa.create_engine(uri)
        with engine.begin() as connection:
            connection.execute(
                sa.text("UPDATE model_versions SET storage_location=:to WHERE version=1 AND name='bot'"),
                {"to": original},
            )
        assert done("lock") == {1: "restored"}
        assert stock.get_model_version_download_uri("bot", "1") == location
        assert done("lock", "demote") == {}
        with engine.connect() as connection:
            ledger.verify_chain(connection)
            reasons = connection.execute(sa.select(ledger.TABLE).order_by(ledger.TABLE.c.sequence)).all()
        assert [row.event for row in reasons] == [
            *("policy", "registered", "promoted", "reconciled", "reconciled", "reconciled")
        ]
        with sa.orm.Session(engine) as session:
            decision = ledger.decision_on(session, "default", "bot", 1)
        assert decision is not None
        assert (decision.event, decision.location) == ("promoted", location)
        engine.dispose()


def test_every_workspace_is_put_right_and_nothing_is_mixed_up(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_WORKSPACES", "true")
    registry = f"sqlite:///{places}/registry.db"
    store = open_store(f"safelock+{registry}", f"sqlite:///{places}/tracking.db")
    folder = places / "model"
    folder.mkdir()
    (folder / "MLmodel").write_text("flavors: {python_function: {loader_module: other}}\n")
    for workspace, other in (("team-a", "team-b"), ("team-b", "team-a")):
        with WorkspaceContext(workspace):
            store.create_registered_model("bot")
            store.create_model_version("bot", str(folder) if workspace == "team-a" else f"/{other}/none")
    with sa.create_engine(registry).begin() as connection:
        connection.execute(sa.text("UPDATE model_versions SET current_stage='Staging'"))
    repairs = list(repairing(store, registry, None).repairs(("lock", "demote")))
    assert {repair.difference.request.workspace: repair.done for repair in repairs} == {
        "team-a": "let through",
        "team-b": "taken out",
    }
    for workspace, stage in (("team-a", "Staging"), ("team-b", "None")):
        with WorkspaceContext(workspace):
            assert store.get_model_version("bot", "1").current_stage == stage


def test_what_cannot_be_read_is_left_and_told_and_the_pass_goes_on(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    store = client._get_registry_client().store
    client.create_registered_model("prices")
    client.create_model_version("prices", AWAY)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "MLmodel").write_text("flavors: {python_function: {loader_module: other}}\n")
    client.create_model_version("prices", str(folder))
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        connection.execute("UPDATE model_versions SET current_stage='Staging'")
    reconciliation = repairing(store, f"sqlite:///{tmp_path}/registry.db", None)
    request = Request("prices", 1, Target("stage", "Staging"), ACTOR, "default")
    contents = contents_of(LocalArtifacts(folder))
    passed = request.row("passed", DEFAULT_POLICY, original_location=AWAY, contents=contents)
    store.reconciling.registry.record(passed)
    # Its row has something to look at, too: a tag that the gate gives to what is locked.
    client.set_model_version_tag("prices", "1", "safelock.state", "locked")
    repairs = {
        repair.difference.request.version: repair for repair in reconciliation.repairs(("lock", "demote"))
    }
    assert (repairs[1].done, repairs[2].done) == (None, "let through")
    assert repairs[1].refusal is not None
    assert repairs[1].refusal.reason == "unreachable"
    assert client.get_model_version("prices", "1").current_stage == "Staging"
    assert "Nothing, until" in facts_of(repairs[1])["demote"]


class TestRaces:
    """What others do between the look and the repair."""

    @pytest.fixture
    def slipped(self, client: MlflowClient, tmp_path: Path) -> tuple[MlflowClient, Reconciling]:
        """A stock client, and what reconciles version 1 of "bot", which is in Staging past the gate."""
        log_fine_tune("bot")
        register_lock(base_lock())
        stock = MlflowClient(f"sqlite:///{tmp_path}/tracking.db", f"sqlite:///{tmp_path}/registry.db")
        stock.transition_model_version_stage("bot", "1", "Staging")
        return stock, client._get_registry_client().store.reconciling

    @pytest.mark.parametrize("ways", [("demote",), ("lock",), ("lock", "demote")])
    def test_what_was_promoted_meanwhile_stays_where_it_is(
        self, client: MlflowClient, slipped: tuple[MlflowClient, Reconciling], ways: tuple[Way, ...]
    ) -> None:
        stock, reconciling = slipped
        difference = reconciling.examine("bot", 1, "default", ACTOR)
        assert difference is not None
        client.transition_model_version_stage("bot", "1", "Staging")
        location = stock.get_model_version_download_uri("bot", "1")
        reconciling.repair(difference, ways)
        assert stock.get_model_version("bot", "1").current_stage == "Staging"
        assert stock.get_model_version_download_uri("bot", "1") == location
        assert reconciling.examine("bot", 1, "default", ACTOR) is None

    @pytest.mark.parametrize("ways", [("demote",), ("lock", "demote")])
    def test_what_was_deleted_meanwhile_is_told_and_the_pass_goes_on(
        self, slipped: tuple[MlflowClient, Reconciling], tmp_path: Path, ways: tuple[Way, ...]
    ) -> None:
        stock, reconciling = slipped
        stock.create_model_version("bot", stock.get_model_version("bot", "1").source)
        stock.transition_model_version_stage("bot", "2", "Production")

        class DeletingTheFirst(Reconciling):
            def examine(self, name: str, version: int, workspace: str, actor: Actor) -> Difference | None:
                difference = super().examine(name, version, workspace, actor)
                if version == 1:
                    stock.delete_model_version(name, "1")
                return difference

        registry = f"sqlite:///{tmp_path}/registry.db"
        racing = DeletingTheFirst(reconciling.guard)
        reconciliation = Reconciliation(registry, lambda: DEFAULT_POLICY, lambda: racing, lambda _: True)
        done = [repair.done for repair in reconciliation.repairs(ways)]
        assert done == ["gone", "locked" if "lock" in ways else "taken out"]

    def test_what_was_moved_meanwhile_is_not_taken_out_of_where_it_was(
        self, slipped: tuple[MlflowClient, Reconciling]
    ) -> None:
        stock, reconciling = slipped
        stock.set_registered_model_alias("bot", "champion", "1")
        difference = reconciling.examine("bot", 1, "default", ACTOR)
        assert difference is not None
        stock.transition_model_version_stage("bot", "1", "Archived")
        repair = reconciling.repair(difference, ("demote",))
        assert (repair.done, repair.refusal and repair.refusal.reason) == (None, "conflict")
        found = stock.get_model_version("bot", "1")
        assert (found.current_stage, found.aliases) == ("Archived", ["champion"])

    @pytest.mark.parametrize("stale", [{"stage": "Production"}, {"location": "/elsewhere"}])
    def test_the_transaction_itself_sees_that_a_version_is_another_by_then(
        self, slipped: tuple[MlflowClient, Reconciling], stale: dict[str, str]
    ) -> None:
        stock, reconciling = slipped
        difference = reconciling.examine("bot", 1, "default", ACTOR)
        assert difference is not None
        found, entry = difference.found, reconciled_entry(difference.request, DEFAULT_POLICY, "taken out", "")
        as_it_was = Withdrawal(replace(found, **stale), leaves_stage=True, aliases=(), entries=(entry,))
        assert not reconciling.registry.withdraw(as_it_was)
        assert stock.get_model_version("bot", "1").current_stage == "Staging"
        assert reconciling.registry.withdraw(replace(as_it_was, found=found))
        assert stock.get_model_version("bot", "1").current_stage == "None"

    def test_what_was_promoted_under_its_new_name_meanwhile_stays_as_that_promotion_has_it(
        self, client: MlflowClient, slipped: tuple[MlflowClient, Reconciling]
    ) -> None:
        stock, reconciling = slipped
        client.transition_model_version_stage("bot", "1", "Staging")
        stock.rename_registered_model("bot", "helper")
        difference = reconciling.examine("helper", 1, "default", ACTOR)
        assert difference is not None
        assert difference.remedy.done == "renamed"
        client.transition_model_version_stage("helper", "1", "Staging")
        location = client.get_model_version_download_uri("helper", "1")
        assert reconciling.repair(difference, ("lock",)).done is None
        assert client.get_model_version_download_uri("helper", "1") == location

    def test_a_row_that_is_edited_again_meanwhile_is_not_put_back_over(
        self, client: MlflowClient, slipped: tuple[MlflowClient, Reconciling], tmp_path: Path
    ) -> None:
        _, reconciling = slipped
        client.transition_model_version_stage("bot", "1", "Staging")
        edit_row(tmp_path, EDIT, "/one")
        difference = reconciling.examine("bot", 1, "default", ACTOR)
        assert difference is not None
        edit_row(tmp_path, EDIT, "/two")
        repair = reconciling.repair(difference, ("lock",))
        assert (repair.done, repair.refusal and repair.refusal.reason) == (None, "conflict")
        again = reconciling.examine("bot", 1, "default", ACTOR)
        assert again is not None
        assert reconciling.repair(again, ("lock",)).done == "restored"


AWAY = "http://127.0.0.1:1/api/2.0/mlflow-artifacts/artifacts/model"
ACTOR = Actor(name="somebody", verified=False)
EDIT = "UPDATE model_versions SET storage_location=? WHERE name='bot' AND version=1"
