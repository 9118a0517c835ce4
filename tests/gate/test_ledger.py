"""The ledger keeps every decision in order, and an edited row is noticed."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import rfc8785
import sqlalchemy as sa
from sqlalchemy.orm import Session

from mlflow_safelock.errors import LedgerError
from mlflow_safelock.gate import ledger, schema
from mlflow_safelock.gate.ledger import GENESIS, TABLE, LedgerEntry, LockInForce
from mlflow_safelock.provenance import Actor

DIGEST = "sha256:" + "12" * 32


def entry(version: int, location: str | None = None) -> LedgerEntry:
    lock = LockInForce(model="safelock.base", version=1, digest=DIGEST, base_model="base")
    return LedgerEntry(
        event="promoted" if location else "rejected",
        time="2026-01-31T12:00:00.000+00:00",
        workspace="default",
        model="bot",
        version=version,
        target="stage:Staging",
        actor=Actor(name="ana", verified=False),
        reason=None if location else "missing_lock",
        message=None,
        policy=DIGEST,
        lock=lock if location else None,
        alpha=6.0 if location else None,
        original_location="s3://b/source" if location else None,
        location=location,
        receipt=DIGEST if location else None,
    )


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/ledger.db")
    schema.bring_up_to_date(engine)
    return engine


def test_rows_come_back_in_order_and_each_is_chained_to_the_one_before(engine: sa.Engine) -> None:
    written = [entry(1), entry(2, "s3://b/locked"), entry(3)]
    for one in written:
        with Session(engine) as session, session.begin():
            ledger.append(session, one)
    with Session(engine) as session:
        assert list(ledger.entries(session)) == written
        rows = session.execute(sa.select(TABLE).order_by(TABLE.c.sequence)).all()
    assert [row.sequence for row in rows] == [1, 2, 3]
    assert [row.previous for row in rows] == [GENESIS, rows[0].digest, rows[1].digest]


def registered(number: int, digit: str, workspace: str = "default") -> LedgerEntry:
    lock = LockInForce(
        model="safelock.base", version=number, digest=f"sha256:{digit * 64}", base_model="base"
    )
    return LedgerEntry(
        event="registered",
        workspace=workspace,
        model=lock.model,
        version=number,
        target="lock:registered",
        actor=Actor(name="ana", verified=False),
        policy=DIGEST,
        lock=lock,
    )


def test_a_lock_keeps_its_place_though_two_clients_put_it_on_record(engine: sa.Engine) -> None:
    for one in (
        registered(1, "1"),
        registered(2, "2"),
        registered(3, "1"),
        registered(1, "3", "other"),
    ):
        with Session(engine) as session, session.begin():
            ledger.append(session, one)
    with Session(engine) as session:
        known = ledger.locks_of(session, "default", "base")
    assert [(one.version, one.lock_digest) for one in known] == [
        (1, f"sha256:{'1' * 64}"),
        (2, f"sha256:{'2' * 64}"),
    ]


def test_a_row_from_before_evaluations_were_named_still_holds(engine: sa.Engine) -> None:
    values = entry(1, "s3://b/locked").model_dump(mode="json")
    del values["evaluations"]
    body = rfc8785.dumps(values)
    with Session(engine) as session, session.begin():
        row = {name: values[name] for name in ("workspace", "event", "model", "version")}
        session.execute(
            TABLE.insert().values(
                **row,
                sequence=1,
                location_key=hashlib.sha256(b"s3://b/locked").hexdigest(),
                previous=GENESIS,
                digest=ledger.row_digest(GENESIS, body),
                body=body.decode(),
            )
        )
        ledger.append(session, entry(2).model_copy(update={"evaluations": (DIGEST,)}))
    with Session(engine) as session:
        old, new = ledger.entries(session)
    assert (old, old.evaluations) == (entry(1, "s3://b/locked"), ())
    assert new.evaluations == (DIGEST,)
    with engine.connect() as connection:
        assert ledger.verify_chain(connection).rows == 2


def test_a_promotion_is_found_by_where_it_put_the_locked_model(engine: sa.Engine) -> None:
    with Session(engine) as session, session.begin():
        ledger.append(session, entry(1, "s3://b/locked"))
        ledger.append(session, entry(2))
    with Session(engine) as session:
        assert ledger.promotion_at(session, "s3://b/locked") == entry(1, "s3://b/locked")
        assert ledger.promotion_at(session, "s3://b/elsewhere") is None


def test_an_edited_row_is_noticed_when_it_is_read(engine: sa.Engine) -> None:
    with Session(engine) as session, session.begin():
        ledger.append(session, entry(1, "s3://b/locked"))
        body = session.execute(sa.select(TABLE.c.body)).scalar_one()
        session.execute(TABLE.update().values(body=body.replace('"alpha":6', '"alpha":1')))
    with Session(engine) as session, pytest.raises(LedgerError, match="Row 1 of the ledger was edited"):
        ledger.promotion_at(session, "s3://b/locked")


def test_two_writers_cannot_fork_the_chain(engine: sa.Engine) -> None:
    with Session(engine) as session, session.begin():
        ledger.append(session, entry(1))
    with Session(engine) as slow, Session(engine) as fast:
        last = slow.execute(sa.select(sa.func.max(TABLE.c.sequence))).scalar_one()
        slow.rollback()
        with fast.begin():
            ledger.append(fast, entry(2))
        with pytest.raises(sa.exc.IntegrityError):
            slow.execute(
                TABLE.insert().values(
                    sequence=last + 1,
                    workspace="default",
                    event="rejected",
                    model="bot",
                    version=3,
                    previous="0",
                    digest="0",
                    body="{}",
                )
            )


def test_the_table_is_created_once_by_several_at_a_time(tmp_path: Path) -> None:
    engines = [sa.create_engine(f"sqlite:///{tmp_path}/shared.db") for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(schema.bring_up_to_date, engines))
    assert sa.inspect(engines[0]).has_table(TABLE.name)
