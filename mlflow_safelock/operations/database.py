"""The registry's database: whether it answers, its tables of ours, and what the ledger ends with."""

from __future__ import annotations

import sqlalchemy as sa
from mlflow.store.model_registry.dbmodels.models import SqlRegisteredModel
from sqlalchemy.orm import Session

from mlflow_safelock.errors import LedgerError
from mlflow_safelock.gate import ledger, schema
from mlflow_safelock.operations.findings import Finding

_MODELS: sa.Table = SqlRegisteredModel.__table__


def ask_database(engine: sa.Engine) -> Finding:
    """Whether the database answers with a registered model, or with none.

    Raises:
        LedgerError: It does not; the message holds no address and nothing of the driver's.
    """
    try:
        with engine.connect() as connection:
            connection.execute(sa.select(_MODELS.c.name).limit(1)).all()
    except sa.exc.SQLAlchemyError as error:
        raise LedgerError(
            f"The registry's database does not answer ({type(error).__name__}).",
            next_step="Look whether it runs and accepts this process; if its tables are of an older MLflow, "
            "run: mlflow db upgrade. The log has the details.",
        ) from error
    return Finding("database", "ok", f"The registry's database ({engine.dialect.name}) answers.")


def read_schema(engine: sa.Engine) -> Finding:
    """The version of this package's tables.

    Raises:
        LedgerError: There are none, or a newer version of this package wrote them.
    """
    known = len(schema.STEPS)
    version = schema.version_of(engine) if sa.inspect(engine).has_table(schema.TABLE.name) else 0
    facts = {"version": version, "known": known}
    if version > known:
        raise LedgerError(
            f"The tables of safelock are of version {version}, and this package knows those up to {known}.",
            next_step="Upgrade mlflow-safelock here to the version that wrote them.",
        )
    if version < known:
        return Finding(
            "schema",
            "warning",
            f"The tables of safelock are of version {version}, and are brought to {known} when the registry "
            "is opened next.",
            "Open it with this version: start mlflow server with --registry-store-uri safelock+… on it.",
            facts,
        )
    return Finding("schema", "ok", f"The tables of safelock are of version {version}.", "", facts)


def read_ledger_head(engine: sa.Engine) -> Finding:
    """The ledger's number of rows and its last row's digest.

    Raises:
        LedgerError: There is no ledger, or its end does not hold.
    """
    try:
        with Session(engine) as session:
            if not sa.inspect(engine).has_table(ledger.TABLE.name):
                raise LedgerError(
                    f"The database has no table {ledger.TABLE.name}: no gated registry was ever opened here.",
                    next_step="Start mlflow server with --registry-store-uri safelock+… on it.",
                )
            rows = session.execute(sa.select(sa.func.count()).select_from(ledger.TABLE)).scalar_one()
            newest = ledger.last_entries(session, 1)  # checks that row's digest
            digest = session.execute(
                sa.select(ledger.TABLE.c.digest).order_by(ledger.TABLE.c.sequence.desc()).limit(1)
            ).scalar_one_or_none()
    except sa.exc.SQLAlchemyError as error:
        raise LedgerError(
            f"The ledger cannot be read ({type(error).__name__}).",
            next_step="Look whether this process may read the table. The log has the details.",
        ) from error
    numbered = newest[0][0] if newest else 0
    if numbered != rows:
        raise LedgerError(
            f"The ledger has {rows} rows, and its last has the number {numbered}: rows were removed.",
            next_step="Find the first gap: safelock ledger verify. Then restore the table from a backup.",
        )
    facts = {"rows": rows, "head": digest}
    return Finding("ledger", "ok", f"The ledger has {rows} rows; its head is {digest or 'none'}.", "", facts)
