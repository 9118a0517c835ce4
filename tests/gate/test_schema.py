"""The package's own tables: made once, brought up to date, and left alone where they are newer."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from mlflow_safelock.errors import LedgerError
from mlflow_safelock.gate import leases, ledger, schema
from mlflow_safelock.gate.ledger import LockInForce
from mlflow_safelock.provenance import Actor


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    return sa.create_engine(f"sqlite:///{tmp_path}/registry.db")


def test_new_tables_have_the_newest_version_and_stay_as_they_are(engine: sa.Engine) -> None:
    for _ in range(2):
        schema.bring_up_to_date(engine)
        assert schema.version_of(engine) == len(schema.STEPS)
    assert {ledger.TABLE.name, leases.TABLE.name} <= set(sa.inspect(engine).get_table_names())


def test_a_ledger_from_before_there_were_versions_keeps_its_rows_and_gets_what_it_lacks(
    engine: sa.Engine,
) -> None:
    ledger.TABLE.create(engine)
    with engine.begin() as connection:
        connection.execute(
            ledger.TABLE.insert().values(
                sequence=1, workspace="default", event="passed", model="bot", version=1, previous="0",
                digest="1", body="{}",
            )
        )  # fmt: skip
        for index in sa.inspect(engine).get_indexes(ledger.TABLE.name):
            connection.execute(sa.text(f"DROP INDEX {index['name']}"))
    schema.bring_up_to_date(engine)
    assert schema.version_of(engine) == len(schema.STEPS)
    found = {index["name"] for index in sa.inspect(engine).get_indexes(ledger.TABLE.name)}
    assert found >= {index.name for index in ledger.TABLE.indexes}
    assert found
    with engine.connect() as connection:
        assert connection.execute(sa.select(ledger.TABLE.c.digest)).scalar_one() == "1"


def test_tables_that_a_newer_version_wrote_are_refused_and_left_alone(engine: sa.Engine) -> None:
    schema.bring_up_to_date(engine)
    newer = len(schema.STEPS) + 1
    with engine.begin() as connection:
        connection.execute(schema.TABLE.update().values(version=newer))
    with pytest.raises(LedgerError, match="Upgrade mlflow-safelock"):
        schema.bring_up_to_date(engine)
    assert schema.version_of(engine) == newer


def test_locks_that_were_applied_before_they_had_rows_get_them_once_in_that_order(engine: sa.Engine) -> None:
    for step in schema.STEPS[:2]:
        step(engine)
    with Session(engine) as session, session.begin():
        for version, digest in enumerate(("2", "1", "2", "3"), 1):
            lock = LockInForce(
                model="safelock.b", version=int(digest), digest=f"sha256:{64 * digest}", base_model="b"
            )
            ledger.append(session, promotion(version, lock))
    for _ in range(2):
        schema.bring_up_to_date(engine)
        with Session(engine) as session:
            found = ledger.locks_of(session, "default", "b")
        assert [entry.lock and entry.lock.version for entry in found] == [2, 1, 3]
        assert {(entry.model, entry.target) for entry in found} == {("safelock.b", "lock:registered")}
    with engine.connect() as connection:
        assert ledger.verify_chain(connection).rows == 7


def promotion(version: int, lock: LockInForce) -> ledger.LedgerEntry:
    return ledger.LedgerEntry(
        event="promoted",
        workspace="default",
        model="bot",
        version=version,
        target="stage:Staging",
        actor=Actor(name="ana", verified=False),
        policy=lock.digest,
        lock=lock,
        alpha=6.0,
        original_location="s3://b/source",
        location=f"s3://b/locked/{version}",
        receipt=lock.digest,
    )


def test_an_edited_row_does_not_keep_the_ledger_from_being_brought_up_to_date(engine: sa.Engine) -> None:
    schema.bring_up_to_date(engine)
    with Session(engine) as session, session.begin():
        for number in (1, 2):
            digest = f"sha256:{str(number) * 64}"
            lock = LockInForce(model="safelock.base", version=number, digest=digest, base_model="base")
            ledger.append(
                session,
                ledger.LedgerEntry(
                    event="promoted", workspace="default", model="bot", version=number,
                    target="stage:Staging", actor=Actor(name="ana", verified=False), policy=digest, lock=lock,
                ),
            )  # fmt: skip
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE safelock_ledger SET body = '{}' WHERE sequence = 1"))
        connection.execute(schema.TABLE.update().values(version=2))
    schema.bring_up_to_date(engine)
    with Session(engine) as session:
        assert [one.version for one in ledger.locks_of(session, "default", "base")] == [2]
        with pytest.raises(LedgerError, match="Row 1"):
            ledger.decision_on(session, "default", "bot", 1)
