"""What an administrator does: unlock, revoke, look into the ledger, check a policy."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest
import rfc8785
import sqlalchemy as sa
from mlflow import MlflowClient

from mlflow_safelock.errors import LedgerError
from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from mlflow_safelock.gate.ledger import GENESIS, TABLE, row_digest, verify_chain
from tests.cli.conftest import Run
from tests.registries import BASE, base_lock, log_fine_tune, register_lock

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")


def addresses(folder: Path) -> tuple[str, ...]:
    return (
        *("--registry-uri", f"safelock+sqlite:///{folder}/registry.db"),
        *("--tracking-uri", f"sqlite:///{folder}/tracking.db"),
    )


@pytest.fixture
def locked(client: MlflowClient) -> str:
    """A version in Staging; where its fine-tune is."""
    version = log_fine_tune("bot")
    original = client.get_model_version_download_uri("bot", str(version))
    register_lock(base_lock())
    client.transition_model_version_stage("bot", str(version), "Staging")
    return original


def test_unlock_gives_the_fine_tune_back_once_nothing_gated_holds_it(
    run: Run, client: MlflowClient, tmp_path: Path, locked: str
) -> None:
    command = ("unlock", "models:/bot/1", "--reason", "to retrain it", *addresses(tmp_path))
    refused = run(*command)
    assert refused.exit_code == 1
    assert "stage:Staging" in refused.stderr
    client.transition_model_version_stage("bot", "1", "None")
    done = run(*command, "--format", "json")
    assert done.json == {"model": "bot", "version": 1, "location": locked}
    assert client.get_model_version_download_uri("bot", "1") == locked
    shown = run("ledger", "show", *addresses(tmp_path), "--model", "bot", "--format", "json").json
    assert (shown[0]["event"], shown[0]["message"]) == ("unlocked", "to retrain it")


def test_unlock_wants_a_reason_and_a_guarded_registry(run: Run, tmp_path: Path) -> None:
    assert run("unlock", "models:/bot/1").exit_code == 2
    done = run("unlock", "models:/bot/1", "--reason", "x", "--registry-uri", f"sqlite:///{tmp_path}/r.db")
    assert done.exit_code == 1
    assert "safelock+sqlite" in done.stderr
    assert run("unlock", "models:/bot@champion", "--reason", "x").exit_code == 2


def test_revoke_stops_a_lock(run: Run, client: MlflowClient, tmp_path: Path, locked: str) -> None:
    uri = f"models:/{lock_model_name(BASE)}/1"
    done = run("lock", "revoke", uri, "--reason", "leaked", *addresses(tmp_path))
    assert done.exit_code == 0
    assert base_lock().digest in done.stdout
    second = log_fine_tune("bot")
    with pytest.raises(Exception, match=r"lock_revoked.*leaked"):
        client.transition_model_version_stage("bot", str(second), "Staging")


class TestLedger:
    def test_it_is_shown_newest_first(self, run: Run, tmp_path: Path, locked: str) -> None:
        rows = run("ledger", "show", *addresses(tmp_path), "--format", "json").json
        assert [row["event"] for row in rows] == ["promoted", "registered", "policy"]
        assert [row["sequence"] for row in rows] == [3, 2, 1]
        table = run("ledger", "show", *addresses(tmp_path), "--limit", "1")
        assert "promoted" in table.stdout
        assert "policy" not in table.stdout

    def test_a_ledger_that_nobody_touched_holds(self, run: Run, tmp_path: Path, locked: str) -> None:
        done = run("ledger", "verify", *addresses(tmp_path), "--format", "json").json
        with sqlite3.connect(tmp_path / "registry.db") as connection:
            (head,) = connection.execute("SELECT digest FROM safelock_ledger WHERE sequence=3").fetchone()
        assert done == {"ok": True, "rows": 3, "head": head, "anchored_rows": None}

    def test_looking_at_it_writes_nothing(
        self, run: Run, tmp_path: Path, locked: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "other.yaml").write_text("version: 1\ngates: [{stages: [Production]}]\n")
        monkeypatch.setenv("SAFELOCK_POLICY", str(tmp_path / "other.yaml"))
        for command in ("verify", "show"):
            assert run("ledger", command, *addresses(tmp_path)).exit_code == 0
        assert run("ledger", "verify", *addresses(tmp_path), "--format", "json").json["rows"] == 3

    def test_a_database_without_one_is_an_error(self, run: Run, tmp_path: Path) -> None:
        done = run("ledger", "verify", "--registry-uri", f"sqlite:///{tmp_path}/new.db")
        assert done.exit_code == 1
        assert "There is no ledger" in done.stderr

    @pytest.mark.parametrize(
        ("statement", "message"),
        [
            ("UPDATE safelock_ledger SET body=replace(body,'alpha','alphA') WHERE sequence=2", "row 2.*body"),
            ("UPDATE safelock_ledger SET model='other' WHERE sequence=2", "row 2.*columns"),
            ("UPDATE safelock_ledger SET event='passed' WHERE sequence=2", "row 2.*columns"),
            ("UPDATE safelock_ledger SET location_key='x' WHERE sequence=2", "row 2.*looked up"),
            ("UPDATE safelock_ledger SET sequence=7 WHERE sequence=2", "row 2 is missing"),
            ("DELETE FROM safelock_ledger WHERE sequence=1", "row 1 is missing"),
            ("UPDATE safelock_ledger SET previous=digest WHERE sequence=2", "row 2.*not chained"),
        ],
    )
    def test_the_first_row_that_does_not_fit_is_named(
        self, run: Run, tmp_path: Path, locked: str, statement: str, message: str
    ) -> None:
        self.spoil_and_verify(run, tmp_path, (statement,), message)

    @pytest.mark.parametrize("body", ["[]", "3", "not json", "{}", '{"event":"revoked"}'])
    def test_a_body_that_is_none_is_named_though_its_digest_fits(
        self, run: Run, tmp_path: Path, locked: str, body: str
    ) -> None:
        with sqlite3.connect(tmp_path / "registry.db") as connection:
            (previous,) = connection.execute(
                "SELECT previous FROM safelock_ledger WHERE sequence=2"
            ).fetchone()
        digest = row_digest(previous, body.encode())
        statement = "UPDATE safelock_ledger SET body=?, digest=? WHERE sequence=2"
        self.spoil_and_verify(run, tmp_path, (statement, (body, digest)), "row 2.*not one that the gate")

    @staticmethod
    def spoil_and_verify(run: Run, tmp_path: Path, statement: tuple, message: str) -> None:
        with sqlite3.connect(tmp_path / "registry.db") as connection:
            assert connection.execute(*statement).rowcount == 1
        engine = sa.create_engine(f"sqlite:///{tmp_path}/registry.db")
        with engine.connect() as connection, pytest.raises(LedgerError, match=message):
            verify_chain(connection)
        done = run("ledger", "verify", *addresses(tmp_path))
        assert done.exit_code == 1
        assert "backup" in done.stderr
        told = run("ledger", "verify", *addresses(tmp_path), "--format", "json")
        assert (told.exit_code, told.json["ok"]) == (1, False)
        assert f"row {told.json['row']}" in told.json["cause"]


def test_a_long_ledger_is_walked_row_by_row() -> None:
    engine = sa.create_engine("sqlite://")
    TABLE.create(engine)
    rows, head = [], GENESIS
    for sequence in range(1, 20_001):
        values = {"workspace": "default", "event": "rejected", "model": "bot", "version": 1, "location": None}
        body = rfc8785.dumps(values)
        digest = row_digest(head, body)
        columns = {"sequence": sequence, "previous": head, "digest": digest, "body": body.decode()}
        rows.append({**{k: v for k, v in values.items() if k != "location"}, "location_key": None, **columns})
        head = digest
    with engine.begin() as connection:
        connection.execute(TABLE.insert(), rows)
        started = time.perf_counter()
        chain = verify_chain(connection)
        print(f"20,000 rows in {time.perf_counter() - started:.2f} s")
        assert (chain.rows, chain.head) == (20_000, head)
        connection.execute(TABLE.delete().where(TABLE.c.sequence == 12_345))
        with pytest.raises(LedgerError, match="row 12345 is missing"):
            verify_chain(connection)


class TestPolicy:
    TEXT = 'version: 1\ngates:\n  - models: "internal-*"\n    stages: [Production]\n  - models: "support-*"\n'

    def test_a_sound_policy_is_shown_with_its_defaults(self, run: Run, tmp_path: Path) -> None:
        path = tmp_path / "safelock.yaml"
        path.write_text(self.TEXT)
        done = run("policy", "check", path)
        assert done.exit_code == 0
        assert "min_cosine: 0.5" in done.stdout
        assert "digest  sha256:" in done.stdout
        assert "Who may take a lock off: anybody" in done.stdout

    def test_it_tells_who_may_override(self, run: Run, tmp_path: Path) -> None:
        path = tmp_path / "safelock.yaml"
        path.write_text(self.TEXT + "unlock: deny\nrevoke: {by: [ann, 'sec-*']}\n")
        assert "Who may revoke a lock: ann, sec-*, authenticated" in run("policy", "check", path).stdout
        found = run("policy", "check", path, "--format", "json").json
        assert found["who_may"] == {
            "unlock": "nobody",
            "revoke": "ann, sec-*, authenticated",
            "other_alpha": "anybody",
        }

    def test_it_tells_which_gate_decides_and_why(self, run: Run, tmp_path: Path) -> None:
        path = tmp_path / "safelock.yaml"
        path.write_text(self.TEXT)
        found = run("policy", "check", path, "--model", "support-bot", "--format", "json").json
        assert found["gate"]["models"] == "support-*"
        assert found["why"] == [
            "gate 1: 'internal-*' does not match 'support-bot'.",
            "gate 2: 'support-*' matches 'support-bot', and decides.",
        ]
        other = run("policy", "check", path, "--model", "prices")
        assert "No gate is for 'prices'" in other.stdout

    def test_a_faulty_policy_is_refused_with_the_line(self, run: Run, tmp_path: Path) -> None:
        path = tmp_path / "safelock.yaml"
        path.write_text("version: 1\ngates:\n  - stages: [Nowhere]\n")
        done = run("policy", "check", path)
        assert done.exit_code == 1
        assert "line 3" in done.stderr

    def test_without_a_file_it_is_the_one_in_force(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("SAFELOCK_POLICY", raising=False)
        assert run("policy", "check", "--format", "json").json["policy"]["gates"][0]["models"] == "*"
        path = tmp_path / "safelock.yaml"
        path.write_text(self.TEXT)
        monkeypatch.setenv("SAFELOCK_POLICY", str(path))
        assert run("policy", "check", "--format", "json").json["policy"]["gates"][0]["models"] == "internal-*"
