"""``safelock reconcile``: what came past the gate is locked, put back or taken out, and on record."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
import sqlalchemy as sa
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sklearn.linear_model import LinearRegression

from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from mlflow_safelock.gate.ledger import verify_chain
from mlflow_safelock.registry import sql, sql_ledger
from tests.cli.conftest import Run
from tests.registries import (
    BASE,
    base_lock,
    biases_of,
    files_below,
    fine_tune,
    log_fine_tune,
    register_lock,
    state_of,
)
from tests.registry.test_guard import edit_row, store_of
from tests.registry.test_leases import hold
from tests.registry.test_promotion import ledger_rows, open_with_policy, stage

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*rename_registered_model:FutureWarning"),
]

LOCATION = "UPDATE model_versions SET storage_location=? WHERE name='bot' AND version=?"


def stock(folder: Path) -> MlflowClient:
    """A client that opens the same database without the gate."""
    return MlflowClient(f"sqlite:///{folder}/tracking.db", f"sqlite:///{folder}/registry.db")


def events(folder: Path) -> list[tuple[str, str | None]]:
    """The ledger's rows, with what each repair did; the chain holds."""
    with sa.create_engine(f"sqlite:///{folder}/registry.db").connect() as connection:
        verify_chain(connection)
    return [
        (row["event"], row["reason"] if row["event"] == "reconciled" else None) for row in ledger_rows(folder)
    ]


def biases(uri: str) -> dict[int, Any]:
    return biases_of(mlflow.pyfunc.load_model(uri)._model_impl.pipeline.model)


def log_plain_model(name: str) -> None:
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0]),
            name="model",
            registered_model_name=name,
            pip_requirements=["scikit-learn"],
            serialization_format="cloudpickle",
        )


def test_the_report_says_what_would_be_done_and_writes_nothing(
    run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...]
) -> None:
    version = log_fine_tune("bot")
    original = client.get_model_version_download_uri("bot", str(version))
    nobodys = log_fine_tune("nobodys", fine_tune(base="org/nobody"))
    log_plain_model("prices")
    register_lock(base_lock())
    stage(client, version)
    slipped = client.create_model_version("bot", client.get_model_version("bot", "1").source)
    assert run("reconcile", *gated).exit_code == 0
    edit_row(tmp_path, LOCATION, original, version)
    past = stock(tmp_path)
    past.set_registered_model_alias("bot", "Champion", slipped.version)
    past.transition_model_version_stage("nobodys", str(nobodys), "Production")
    past.transition_model_version_stage("prices", "1", "Staging")
    before = (tmp_path / "registry.db").read_bytes(), files_below(tmp_path)
    for uri in (gated[-1], gated[-1].removeprefix("safelock+")):
        done = run("reconcile", *gated[:2], "--registry-uri", uri, "--format", "json")
        assert done.exit_code == 3
        found = {(row["model"], row["version"]): row for row in done.json}
        assert set(found) == {("bot", 1), ("bot", 2), ("nobodys", 1), ("prices", 1)}
        assert {row["done"] for row in done.json} == {None}
        assert f"put back to {original}-safelock/" in found["bot", 1]["lock"]
        assert "the ledger has it at" in found["bot", 1]["found"]
        assert "locked with models:/safelock.org--tiny-base/1 at alpha 6" in found["bot", 2]["lock"]
        assert found["bot", 2]["places"] == ["alias:Champion"]
        assert "refused [missing_lock]" in found["nobodys", 1]["lock"]
        assert found["nobodys", 1]["refusal"]["reason"] == "missing_lock"
        assert "taken out of stage:Production" in found["nobodys", 1]["demote"]
        for way in ("lock", "demote"):
            assert "let through unlocked" in found["prices", 1][way]
    table = run("reconcile", *gated)
    assert table.exit_code == 3
    assert "Error: 4 model version(s)" in table.stderr
    assert "bot version 2: --lock: It would be locked" in table.stdout
    assert run("reconcile", *gated, "--model", "other").exit_code == 0
    assert ((tmp_path / "registry.db").read_bytes(), files_below(tmp_path)) == before


def test_what_slipped_through_is_locked_as_by_a_transition(
    run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...]
) -> None:
    log_fine_tune("bot")
    register_lock(base_lock())
    stock(tmp_path).transition_model_version_stage("bot", "1", "Staging")
    with pytest.raises(MlflowException, match="not_locked"):
        mlflow.pyfunc.load_model("models:/bot/Staging")
    done = run("reconcile", "--lock", *gated, "--format", "json")
    assert (done.exit_code, [row["done"] for row in done.json]) == (0, ["locked"])
    assert biases("models:/bot/Staging")
    refused, promoted, reconciled = ledger_rows(tmp_path)
    assert (refused["event"], refused["target"]) == ("rejected", "read:download")
    assert (promoted["event"], promoted["target"]) == ("promoted", "stage:Staging")
    assert reconciled["reason"] == "locked"
    assert "the ledger knows no promotion of it. It was locked." in reconciled["message"]
    assert reconciled["actor"] == promoted["actor"]
    again = run("reconcile", "--lock", "--demote", *gated)
    assert (again.exit_code, len(ledger_rows(tmp_path))) == (0, 3)
    shown = run("ledger", "show", *gated, "--limit", "1").stdout
    assert "reconciled" in shown


class TestARowThatWasEdited:
    @pytest.fixture
    def locked(self, client: MlflowClient) -> dict[str, Any]:
        """A locked version in Staging, and what is known of it."""
        version = log_fine_tune("bot")
        register_lock(base_lock())
        before = client.get_model_version_download_uri("bot", str(version))
        stage(client, version)
        return {**state_of(client, "bot", version), "original": before}

    def test_goes_back_to_what_the_ledger_says_location_and_tags(
        self, run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], locked: dict[str, Any]
    ) -> None:
        stranger = log_fine_tune("stranger")
        elsewhere = client.get_model_version_download_uri("stranger", str(stranger))
        edit_row(tmp_path, LOCATION, elsewhere, 1)
        client.set_model_version_tag("bot", "1", "safelock.state", "unlocked")
        client.delete_model_version_tag("bot", "1", "safelock.receipt")
        client.set_model_version_tag("bot", "1", "team", "support")
        done = run("reconcile", "--lock", *gated, "--format", "json")
        assert (done.exit_code, [row["done"] for row in done.json]) == (0, ["restored"])
        after = state_of(client, "bot", 1)
        assert after["location"] == locked["location"]
        assert after["tags"] == {**locked["tags"], "team": "support"}
        assert not Path(f"{elsewhere}-safelock").exists()
        assert events(tmp_path) == [("promoted", None), ("reconciled", "restored")]
        assert elsewhere in ledger_rows(tmp_path)[-1]["message"]

    def test_back_to_an_earlier_promotion_is_found_by_the_audit_and_put_right(
        self, run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], locked: dict[str, Any]
    ) -> None:
        register_lock(base_lock(seed=1))
        stage(client, 1)
        newest = client.get_model_version_download_uri("bot", "1")
        edit_row(tmp_path, LOCATION, locked["location"], 1)
        assert run("audit", *gated).exit_code == 3
        assert run("reconcile", "--lock", *gated).exit_code == 0
        assert run("audit", *gated).exit_code == 0
        assert client.get_model_version_download_uri("bot", "1") == newest

    def test_is_locked_again_from_its_own_source_where_its_locked_model_is_gone(
        self, run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], locked: dict[str, Any]
    ) -> None:
        shutil.rmtree(locked["location"])
        edit_row(tmp_path, LOCATION, "/nowhere/at/all", 1)
        done = run("reconcile", "--lock", *gated, "--format", "json").json
        assert [row["done"] for row in done] == ["locked"]
        assert biases("models:/bot/Staging")
        after = client.get_model_version_download_uri("bot", "1")
        assert after.startswith(locked["original"])
        assert [row[1] for row in events(tmp_path)] == [None, "restored", None, "locked"]

    def test_is_promoted_from_its_own_source_where_another_lock_would_be_applied_by_now(
        self, run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], locked: dict[str, Any]
    ) -> None:
        register_lock(base_lock(seed=1))
        stranger = log_fine_tune("stranger")
        elsewhere = client.get_model_version_download_uri("stranger", str(stranger))
        edit_row(tmp_path, LOCATION, elsewhere, 1)
        done = run("reconcile", "--lock", *gated, "--format", "json")
        assert (done.exit_code, [row["done"] for row in done.json]) == (0, ["locked"])
        row = next(row for row in reversed(ledger_rows(tmp_path)) if row["event"] == "promoted")
        assert (row["lock"]["version"], row["original_location"]) == (2, locked["original"])
        assert client.get_model_version_download_uri("bot", "1") == row["location"]

    def test_goes_back_to_its_own_source_where_the_gate_refuses_and_is_served_to_nobody(
        self, run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], locked: dict[str, Any]
    ) -> None:
        (Path(locked["original"]) / "model" / "config.json").write_text("{}")
        edit_row(tmp_path, LOCATION, "/nowhere", 1)
        for _ in range(2):
            (row,) = run("reconcile", "--lock", *gated, "--format", "json").json
            assert (row["done"], row["refusal"]["reason"]) == (None, "unsupported_architecture")
        assert events(tmp_path) == [("promoted", None), ("reconciled", "restored")], "once"
        assert state_of(stock(tmp_path), "bot", 1)["location"] == locked["original"]
        with pytest.raises(MlflowException, match="not_locked"):
            client.get_model_version_download_uri("bot", "1")
        (row,) = run("reconcile", "--lock", "--demote", *gated, "--format", "json").json
        assert row["done"] == "taken out"

    def test_is_found_by_its_files_alone_that_reads_refuse_and_locked_again(
        self, run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], locked: dict[str, Any]
    ) -> None:
        mlmodel = Path(locked["location"]) / "MLmodel"
        mlmodel.write_text(mlmodel.read_text() + "\n")
        with pytest.raises(MlflowException, match=r"not_locked.*'MLmodel'"):
            client.get_model_version_download_uri("bot", "1")
        assert run("audit", *gated).exit_code == 0, "it looks at rows"
        looked = run("reconcile", *gated, "--format", "json")
        assert (looked.exit_code, len(looked.json)) == (3, 1)
        assert "'MLmodel'" in looked.json[0]["found"]
        assert "taken out of stage:Staging" in looked.json[0]["demote"]
        done = run("reconcile", "--lock", "--demote", *gated, "--format", "json")
        assert (done.exit_code, [row["done"] for row in done.json]) == (0, ["locked"])
        assert biases("models:/bot/Staging")
        # Where none of it is there, this may be the wrong machine: that is no reason to take it out.
        location = Path(client.get_model_version_download_uri("bot", "1"))
        for folder in (location, Path(locked["original"])):
            folder.rename(folder.with_name("away"))
        (row,) = run("reconcile", "--lock", "--demote", *gated, "--format", "json").json
        assert (row["done"], row["refusal"]["reason"]) == (None, "unreadable")
        assert client.get_model_version("bot", "1").current_stage == "Staging"

    def test_tags_alone_are_put_back_and_are_no_reason_to_take_it_out(
        self, run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], locked: dict[str, Any]
    ) -> None:
        client.set_model_version_tag("bot", "1", "safelock.applied_alpha", "60")
        assert run("reconcile", "--demote", *gated).exit_code == 3
        assert state_of(client, "bot", 1)["stage"] == "Staging"
        assert run("reconcile", "--lock", "--demote", *gated).exit_code == 0
        after = state_of(client, "bot", 1)
        assert after == {key: locked[key] for key in after}

    def test_what_was_put_right_goes_along_with_a_renaming(
        self, run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], locked: dict[str, Any]
    ) -> None:
        edit_row(tmp_path, LOCATION, locked["original"], 1)
        run("reconcile", "--lock", *gated)
        client.rename_registered_model("bot", "helper")
        assert biases("models:/helper/Staging")
        assert run("reconcile", "--lock", "--demote", *gated, "--format", "json").json == []

    def test_of_a_model_that_was_renamed_past_the_gate_its_history_goes_on(
        self, run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], locked: dict[str, Any]
    ) -> None:
        stock(tmp_path).rename_registered_model("bot", "helper")
        with pytest.raises(MlflowException, match="not_locked"):
            client.get_model_version_download_uri("helper", "1")
        done = run("reconcile", "--demote", *gated, "--format", "json").json
        assert [row["done"] for row in done] == ["renamed"]
        assert client.get_model_version_download_uri("helper", "1") == locked["location"]
        assert events(tmp_path) == [
            *(("promoted", None), ("rejected", None), ("renamed", None), ("reconciled", "renamed"))
        ]


class TestWhatTheGateRefuses:
    @pytest.fixture
    def slipped(self, client: MlflowClient, tmp_path: Path) -> dict[str, Any]:
        """A version without a lock for its base, in places of both kinds."""
        log_fine_tune("bot")
        past = stock(tmp_path)
        past.transition_model_version_stage("bot", "1", "Production")
        for alias in ("Champion", "staging", "experiment"):
            past.set_registered_model_alias("bot", alias, "1")
        return state_of(past, "bot", 1)

    def test_is_left_as_it_is_with_the_reason(
        self, run: Run, tmp_path: Path, gated: tuple[str, ...], slipped: dict[str, Any]
    ) -> None:
        for _ in range(2):
            done = run("reconcile", "--lock", *gated, "--format", "json")
            assert done.exit_code == 3
            (row,) = done.json
            assert (row["done"], row["refusal"]["reason"]) == (None, "missing_lock")
            assert "safelock lock register" in row["refusal"]["next_step"]
        assert "Refused [missing_lock]" in run("reconcile", "--lock", *gated).stdout
        assert state_of(stock(tmp_path), "bot", 1) == slipped
        assert ledger_rows(tmp_path) == [], "looking again and again does not fill the ledger"

    @pytest.mark.parametrize("ways", [("--demote",), ("--lock", "--demote")])
    def test_is_taken_out_of_every_gated_place_and_of_no_other(
        self, run: Run, tmp_path: Path, gated: tuple[str, ...], slipped: dict[str, Any], ways: tuple[str, ...]
    ) -> None:
        done = run("reconcile", *ways, *gated, "--format", "json")
        assert (done.exit_code, [row["done"] for row in done.json]) == (0, ["taken out"])
        after = state_of(stock(tmp_path), "bot", 1)
        assert after == {**slipped, "stage": "None", "aliases": ["experiment"]}
        assert events(tmp_path) == [("reconciled", "taken out")]
        message = ledger_rows(tmp_path)[0]["message"]
        assert "It was taken out of stage:Production and alias:Champion and alias:staging." in message
        assert "[missing_lock]" in message

    def test_is_left_while_somebody_else_is_at_work_on_it(
        self,
        run: Run,
        client: MlflowClient,
        tmp_path: Path,
        gated: tuple[str, ...],
        slipped: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(sql_ledger, "LONGEST_WAIT", 0.2)
        hold(sql.SqlRegistry(client._get_registry_client().store), "elsewhere/pid:[1]|1|1|abc")
        (row,) = run("reconcile", "--demote", *gated, "--format", "json").json
        assert (row["done"], row["refusal"]["reason"]) == (None, "conflict")
        assert state_of(stock(tmp_path), "bot", 1) == slipped


@pytest.mark.parametrize("way", ["--lock", "--demote"])
def test_a_model_of_another_kind_stays_where_it_was_before_the_gate(
    run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], way: str
) -> None:
    log_plain_model("prices")
    stock(tmp_path).transition_model_version_stage("prices", "1", "Staging")
    before = state_of(stock(tmp_path), "prices", 1)
    done = run("reconcile", way, *gated, "--format", "json")
    assert (done.exit_code, [row["done"] for row in done.json]) == (0, ["let through"])
    assert state_of(client, "prices", 1) == before
    assert events(tmp_path) == [("passed", None), ("reconciled", "let through")]


def test_what_was_let_through_is_found_when_it_changed_and_when_its_row_says_nothing_of_its_files(
    run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{missing_lock: allow}]\n")
    version = log_fine_tune("bot")
    stage(client, version)
    config = Path(client.get_model_version_download_uri("bot", str(version))) / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    (row,) = run("reconcile", *gated, "--format", "json").json
    assert "its files were changed" in row["found"]
    assert "let through unlocked" in row["lock"]
    done = run("reconcile", "--lock", *gated, "--format", "json")
    assert (done.exit_code, [row["done"] for row in done.json]) == (0, ["let through"])
    assert client.get_model_version_download_uri("bot", str(version))

    registry = client._get_registry_client().store._gate.registry
    known = registry.decision_on("default", "bot", version)
    registry.record(known.model_copy(update={"contents": None}))
    with pytest.raises(
        MlflowException, match=r"not_locked.*before what it held was kept on record.*Promote it again"
    ):
        client.get_model_version_download_uri("bot", str(version))
    done = run("reconcile", "--lock", *gated, "--format", "json")
    assert (done.exit_code, [row["done"] for row in done.json]) == (0, ["let through"])
    assert "before what it held was kept on record" in done.json[0]["found"]
    assert client.get_model_version_download_uri("bot", str(version))


def test_a_version_whose_row_of_the_ledger_was_edited_can_only_be_taken_out(
    run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...]
) -> None:
    log_fine_tune("bot")
    register_lock(base_lock())
    stage(client, 1)
    edit_row(
        tmp_path,
        "UPDATE safelock_ledger SET body=replace(body, '\"alpha\":6', '\"alpha\":9') WHERE model='bot'",
    )
    (row,) = run("reconcile", "--lock", *gated, "--format", "json").json
    assert row["done"] is None
    assert "was edited" in row["refusal"]["cause"]
    (row,) = run("reconcile", "--demote", *gated, "--format", "json").json
    assert row["done"] == "taken out"
    assert client.get_model_version("bot", "1").current_stage == "None"


def test_repairs_want_a_guarded_registry_and_no_database_is_made_by_looking(
    run: Run, client: MlflowClient, tmp_path: Path
) -> None:
    done = run("reconcile", "--lock", "--registry-uri", f"sqlite:///{tmp_path}/registry.db")
    assert done.exit_code == 1
    assert "safelock+sqlite" in done.stderr
    assert run("reconcile", "--registry-uri", "http://127.0.0.1:1").exit_code == 1
    assert run("reconcile", "--registry-uri", f"sqlite:///{tmp_path}/none.db").exit_code == 1
    assert not (tmp_path / "none.db").exists()


def test_watching_has_options_of_its_own_and_listening_wants_a_secret(
    run: Run, client: MlflowClient, gated: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for options in (
        *(
            ("--interval", "5"),
            ("--listen", "127.0.0.1:0"),
            ("--watch", "--sweep"),
            ("--watch", "--interval", "0"),
        ),
        *(("--watch", "--listen", address) for address in ("8765", "host:", ":1", "host:70000", "host:x")),
    ):
        assert run("reconcile", *options, *gated).exit_code == 2, options
    for secret in (None, ""):
        monkeypatch.delenv("SAFELOCK_WEBHOOK_SECRET", raising=False)
        if secret is not None:
            monkeypatch.setenv("SAFELOCK_WEBHOOK_SECRET", secret)
        done = run("reconcile", "--watch", "--listen", "127.0.0.1:0", *gated)
        assert done.exit_code == 1
        assert "SAFELOCK_WEBHOOK_SECRET" in done.stderr


def test_a_model_that_was_deleted_and_made_anew_is_locked_and_not_taken_for_the_old_one(
    run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...]
) -> None:
    register_lock(base_lock())
    first = log_fine_tune("bot")
    stage(client, first)
    old = client.get_model_version_download_uri("bot", str(first))
    client.delete_registered_model("bot")
    again = log_fine_tune("bot")
    assert again == first, "MLflow counts from one again"
    source = client.get_model_version_download_uri("bot", str(again))
    stock(tmp_path).transition_model_version_stage("bot", str(again), "Staging")
    done = run("reconcile", *gated, "--lock", "--format", "json")
    assert done.exit_code == 0, done.stderr
    (row,) = done.json
    assert row["done"] == "locked"
    served = client.get_model_version_download_uri("bot", str(again))
    assert served != old
    assert served.startswith(f"{source}-safelock/")
    assert biases("models:/bot/Staging")


@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("revoked", [True, False])
def test_a_model_that_was_made_anew_of_the_same_source_gets_the_lock_that_a_promotion_applies(
    run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], newer: bool, revoked: bool
) -> None:
    register_lock(base_lock())
    log_fine_tune("bot")
    source = client.get_model_version_download_uri("bot", "1")
    stage(client, 1)
    client.delete_registered_model("bot")
    if newer:
        register_lock(base_lock(seed=1))
    if revoked:
        store_of(client).revoke_lock(lock_model_name(BASE), 1, "leaked")
    client.create_registered_model("bot")
    client.create_model_version("bot", source)
    stock(tmp_path).transition_model_version_stage("bot", "1", "Staging")
    (row,) = run("reconcile", "--lock", *gated, "--format", "json").json
    if revoked and not newer:
        assert (row["done"], row["refusal"]["reason"]) == (None, "lock_revoked")
        assert not [event for event in events(tmp_path) if event[0] == "reconciled"], "it is as it was"
        with pytest.raises(MlflowException, match="not_locked"):
            client.get_model_version_download_uri("bot", "1")
        return
    assert row["done"] == ("locked" if newer else "restored")
    assert client.get_model_version("bot", "1").tags["safelock.lock"].endswith("/2" if newer else "/1")
    assert biases("models:/bot/Staging")
