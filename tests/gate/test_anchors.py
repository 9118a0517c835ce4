"""A checkpoint that was kept elsewhere shows what the chain cannot: a cut end, and a rewritten history."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import rfc8785
import sqlalchemy as sa
from sqlalchemy.orm import Session

from mlflow_safelock.errors import BrokenLedgerError, VerificationError
from mlflow_safelock.gate import ledger
from mlflow_safelock.gate.anchors import read_checkpoint, sign_checkpoint, take_checkpoint, verify_against
from mlflow_safelock.gate.ledger import GENESIS, TABLE, row_digest, verify_chain
from mlflow_safelock.provenance import load_public_key, load_signing_key
from mlflow_safelock.provenance.dsse import sign
from tests.cli.conftest import Run
from tests.cli.conftest import run as run
from tests.gate.test_ledger import engine as engine
from tests.gate.test_ledger import entry
from tests.keys import KeyPair, write_keys
from tests.sigstore_instance import ISSUER, SigstoreInstance


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return write_keys(tmp_path)


def append(engine: sa.Engine, *versions: int) -> None:
    for version in versions:
        with Session(engine) as session, session.begin():
            ledger.append(session, entry(version))


def write_anew(engine: sa.Engine, first: int) -> None:
    """What somebody does who knows the code: another row, and every digest from there on computed again."""
    with engine.begin() as connection:
        rows = connection.execute(sa.select(TABLE).order_by(TABLE.c.sequence)).all()
        head = GENESIS
        for row in rows:
            body = json.loads(row.body)
            if row.sequence == first:
                body["actor"]["name"] = "somebody else"
            data = rfc8785.dumps(body)
            digest = row_digest(head, data)
            values = {"body": data.decode(), "previous": head, "digest": digest}
            connection.execute(TABLE.update().where(TABLE.c.sequence == row.sequence).values(**values))
            head = digest


def test_a_ledger_that_only_grew_agrees_with_every_checkpoint(engine: sa.Engine, keys: KeyPair) -> None:
    checkpoints = []
    with engine.connect() as connection:
        checkpoints.append(take_checkpoint(connection))
    for version in (1, 2, 3):
        append(engine, version)
        with engine.connect() as connection:
            data = sign_checkpoint(take_checkpoint(connection), load_signing_key(keys.private))
        checkpoints.append(read_checkpoint(data, [load_public_key(keys.public)], origin="It"))
    assert [checkpoint.rows for checkpoint in checkpoints] == [0, 1, 2, 3]
    append(engine, 4)
    with engine.connect() as connection:
        assert verify_against(connection, checkpoints).rows == 4


def test_an_end_that_was_cut_off_is_noticed(engine: sa.Engine) -> None:
    append(engine, 1, 2, 3)
    with engine.connect() as connection:
        checkpoint = take_checkpoint(connection)
    with engine.begin() as connection:
        connection.execute(TABLE.delete().where(TABLE.c.sequence == 3))
    with engine.connect() as connection:
        assert verify_chain(connection).rows == 2, "the chain alone does not show it"
        with pytest.raises(BrokenLedgerError, match=r"cut off: it has 2 rows.*says 3") as info:
            verify_against(connection, [checkpoint])
    assert info.value.row == 3


def test_one_that_was_cut_off_and_grew_again_is_noticed(engine: sa.Engine) -> None:
    append(engine, 1, 2, 3)
    with engine.connect() as connection:
        checkpoint = take_checkpoint(connection)
    with engine.begin() as connection:
        connection.execute(TABLE.delete().where(TABLE.c.sequence == 3))
    append(engine, 7, 8)
    with engine.connect() as connection, pytest.raises(BrokenLedgerError, match="row 3 is not what"):
        verify_against(connection, [checkpoint])


@pytest.mark.parametrize(("first", "between"), [(1, "from 1 to 2"), (2, "from 1 to 2"), (3, "from 3 to 4")])
def test_a_rewritten_history_is_noticed_and_between_which_checkpoints(
    engine: sa.Engine, first: int, between: str
) -> None:
    checkpoints = []
    for versions in ((1, 2), (3, 4)):
        append(engine, *versions)
        with engine.connect() as connection:
            checkpoints.append(take_checkpoint(connection))
    append(engine, 5)
    write_anew(engine, first)
    with engine.connect() as connection:
        assert verify_chain(connection).rows == 5, "the chain alone does not show it"
        with pytest.raises(BrokenLedgerError, match=between):
            verify_against(connection, reversed(checkpoints))


def test_what_is_newer_than_the_newest_checkpoint_is_covered_by_the_chain_alone(engine: sa.Engine) -> None:
    append(engine, 1)
    with engine.connect() as connection:
        checkpoint = take_checkpoint(connection)
    append(engine, 2, 3)
    write_anew(engine, 2)
    with engine.connect() as connection:
        assert verify_against(connection, [checkpoint]).rows == 3


def test_a_checkpoint_of_somebody_else_and_a_file_that_is_none_do_not_count(
    engine: sa.Engine, keys: KeyPair, tmp_path: Path
) -> None:
    with engine.connect() as connection:
        data = sign_checkpoint(take_checkpoint(connection), load_signing_key(keys.private))
    other = load_public_key(write_keys(tmp_path, "p256", "other").public)
    with pytest.raises(VerificationError, match="signed by none"):
        read_checkpoint(data, [other], origin="It")
    with pytest.raises(VerificationError, match="not a checkpoint"):
        read_checkpoint(
            sign(b"{}", load_signing_key(keys.private)), [load_public_key(keys.public)], origin="It"
        )


def test_a_broken_chain_is_not_anchored(engine: sa.Engine) -> None:
    append(engine, 1, 2)
    with engine.begin() as connection:
        connection.execute(TABLE.update().where(TABLE.c.sequence == 1).values(model="other"))
    with engine.connect() as connection, pytest.raises(BrokenLedgerError) as info:
        take_checkpoint(connection)
    assert info.value.row == 1


def test_a_password_of_the_database_is_not_written_down() -> None:
    url = sa.make_url("postgresql://mlflow:secret@db/mlflow")
    assert "secret" not in url.render_as_string(hide_password=True)


def test_on_the_command_line(run: Run, engine: sa.Engine, keys: KeyPair, tmp_path: Path) -> None:
    append(engine, 1, 2)
    registry = ("--registry-uri", f"safelock+sqlite:///{tmp_path}/ledger.db", "--format", "json")
    file = tmp_path / "checkpoint.json"
    done = run("ledger", "anchor", "--key", keys.private, "--out", file, *registry)
    assert (done.exit_code, done.json["rows"]) == (0, 2), done.stderr
    anchored = ("ledger", "verify", "--anchor", file, "--public-key", keys.public, *registry)
    append(engine, 3)
    assert run(*anchored).json == {**run(*anchored).json, "ok": True, "rows": 3, "anchored_rows": 2}
    write_anew(engine, 2)
    refused = run(*anchored)
    assert (refused.exit_code, refused.json["ok"], refused.json["row"]) == (1, False, 2)
    with engine.begin() as connection:
        connection.execute(TABLE.delete().where(TABLE.c.sequence > 1))
    assert run(*anchored).json["row"] == 2
    assert run("ledger", "verify", "--anchor", file, *registry).exit_code == 2


def test_an_identity_signs_a_checkpoint_too(
    run: Run, engine: sa.Engine, sigstore: SigstoreInstance, tmp_path: Path
) -> None:
    append(engine, 1, 2)
    registry = ("--registry-uri", f"safelock+sqlite:///{tmp_path}/ledger.db", "--format", "json")
    file = tmp_path / "checkpoint.json"
    sigstore.log_in("auditor@example.org")
    done = run("ledger", "anchor", "--sigstore", "--out", file, *registry)
    assert (done.exit_code, done.json["identity"]) == (0, "auditor@example.org"), done.stderr
    verify = ("ledger", "verify", "--anchor", file, "--identity")
    assert run(*verify, "auditor@example.org", ISSUER, *registry).json["anchored_rows"] == 2
    assert run(*verify, "other@example.org", ISSUER, *registry).exit_code == 1
    write_anew(engine, 2)
    refused = run(*verify, "auditor@example.org", ISSUER, *registry)
    assert (refused.exit_code, refused.json["row"]) == (1, 2)
    assert run("ledger", "anchor", "--out", file, *registry).exit_code == 2


def test_a_hundred_thousand_rows_are_walked_in_seconds() -> None:
    engine = sa.create_engine("sqlite://")
    TABLE.create(engine)
    rows, head = [], GENESIS
    values = entry(1, "s3://bucket/mlflow/1/models/m-0123456789abcdef/artifacts-safelock/" + "0" * 32)
    body = rfc8785.dumps(values.model_dump(mode="json"))
    key = ledger._key(values.location or "")
    for sequence in range(1, 100_001):
        digest = row_digest(head, body)
        rows.append(
            {
                "sequence": sequence,
                "workspace": "default",
                "event": "promoted",
                "model": "bot",
                "version": 1,
                "location_key": key,
                "previous": head,
                "digest": digest,
                "body": body.decode(),
            }
        )
        head = digest
    with engine.begin() as connection:
        connection.execute(TABLE.insert(), rows)
        started = time.perf_counter()
        checkpoint = take_checkpoint(connection)
        took = time.perf_counter() - started
        print(f"100,000 rows of {len(body)} bytes in {took:.2f} s")
        assert (checkpoint.rows, checkpoint.head) == (100_000, head)
        assert took < 30
