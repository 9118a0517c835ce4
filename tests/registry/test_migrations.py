"""``mlflow db upgrade`` brings MLflow's tables up to date with ours beside them, and the gate still holds."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.script import ScriptDirectory
from mlflow import MlflowException
from mlflow.store.db.utils import _get_alembic_config, _get_schema_version
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion
from mlflow.store.tracking.dbmodels.initial_models import Base as FirstTables
from sqlalchemy.orm import Session

from mlflow_safelock.gate import ledger, schema
from mlflow_safelock.gate.ledger import LedgerEntry, LockInForce
from mlflow_safelock.gate.policy import DEFAULT_POLICY
from mlflow_safelock.provenance import Actor
from mlflow_safelock.registry.stores import open_store
from tests.servers import BIN, postgresql

LOCATION_STORED = "acf3f17fdcc7"
"""MLflow's revision since which a version has a download location of its own, without which is no gate."""

ORIGINAL, LOCKED = "/nowhere/models/1/artifacts", "/nowhere/models/1/artifacts-safelock/0123"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URI of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/mlflow.db"
        return
    with postgresql(tmp_path / "database") as uri:
        yield uri


def make_old_registry(uri: str, revision: str) -> sa.Engine:
    """MLflow's tables of a revision and ours, with a promoted version and two that are staged.

    Of these one was promoted, to a locked model that is gone, and one was not.
    """
    engine = sa.create_engine(uri)
    FirstTables.metadata.create_all(engine)
    command.upgrade(_get_alembic_config(uri), revision)
    schema.bring_up_to_date(engine)
    tables = sa.MetaData()
    tables.reflect(engine, only=["registered_models", "model_versions"])
    with Session(engine) as session, session.begin():
        session.execute(tables.tables["registered_models"].insert().values(name="bot", creation_time=1))
        for version, location, stage in (
            (1, LOCKED, "None"),
            (2, ORIGINAL, "Staging"),
            (3, LOCKED, "Staging"),
        ):
            session.execute(
                tables.tables["model_versions"]
                .insert()
                .values(
                    name="bot",
                    version=version,
                    creation_time=1,
                    current_stage=stage,
                    status="READY",
                    source=ORIGINAL,
                    storage_location=location,
                )
            )
        for promoted in (1, 3):
            ledger.append(session, promotion(promoted))
    return engine


def promotion(version: int) -> LedgerEntry:
    digest = f"sha256:{'0' * 64}"
    return LedgerEntry(
        event="promoted",
        time="2026-01-01T00:00:00.000+00:00",
        workspace="default",
        model="bot",
        version=version,
        target="stage:Staging",
        actor=Actor(name="ann", verified=True),
        reason=None,
        message=None,
        policy=DEFAULT_POLICY.digest,
        lock=LockInForce(model="safelock.base", version=1, digest=digest, base_model="org/base"),
        alpha=6.0,
        original_location=ORIGINAL,
        location=LOCKED,
        receipt=digest,
    )


@pytest.mark.parametrize(
    ("empty", "revision"),
    [("sqlite", LOCATION_STORED), ("sqlite", "head"), ("postgresql", LOCATION_STORED)],
    indirect=["empty"],
)
def test_mlflows_upgrade_runs_and_the_ledger_and_the_gate_hold_afterwards(
    empty: str, revision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SAFELOCK_POLICY", raising=False)
    engine = make_old_registry(empty, revision)
    with engine.connect() as connection:
        before = ledger.verify_chain(connection)
        ours = rows(connection)
    newest = ScriptDirectory.from_config(_get_alembic_config(empty)).get_current_head()
    assert (_get_schema_version(engine) == newest) == (revision == "head")

    done = subprocess.run(
        [BIN / "mlflow", "db", "upgrade", empty], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr

    assert _get_schema_version(engine) == newest
    with engine.connect() as connection:
        assert ledger.verify_chain(connection) == before
        assert rows(connection) == ours
    assert schema.version_of(engine) == len(schema.STEPS)
    store = open_store(f"safelock+{empty}", f"sqlite:///{tmp_path}/tracking.db")
    try:
        assert store.get_model_version_download_uri("bot", "1") == LOCKED
        with pytest.raises(MlflowException, match=r"not_locked.*stage:Staging"):
            store.get_model_version_download_uri("bot", "2")
        with pytest.raises(MlflowException, match=r"not_locked.*There is no receipt at"):
            store.get_model_version_download_uri("bot", "3")
        with engine.connect() as connection:
            assert ledger.verify_chain(connection).rows == before.rows + 3, "a policy and two refused reads"
            versions = connection.execute(sa.select(SqlModelVersion.workspace, SqlModelVersion.version))
            assert sorted(versions) == [("default", 1), ("default", 2), ("default", 3)]
    finally:
        store.engine.dispose()
        engine.dispose()


def rows(connection: sa.Connection) -> dict[str, list[tuple[object, ...]]]:
    """All that is in the package's tables."""
    found = sa.MetaData()
    found.reflect(connection, only=lambda name, _: name.startswith("safelock_"))
    return {
        name: [tuple(row) for row in connection.execute(sa.select(table))]
        for name, table in found.tables.items()
    }
