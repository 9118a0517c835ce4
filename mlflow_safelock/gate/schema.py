"""The package's own tables in the registry's database, and their version, apart from MLflow's.

MLflow's migrations know nothing of these tables and leave them alone; these steps leave MLflow's alone. Each
step may be run again, and by several processes at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import sqlalchemy as sa
from sqlalchemy.orm import Session

from mlflow_safelock.errors import LedgerError
from mlflow_safelock.gate import leases, ledger

TABLE = sa.Table(
    "safelock_schema",
    sa.MetaData(),
    # One row, which has this key.
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("version", sa.Integer, nullable=False),
)


def create(table: sa.Table, engine: sa.Engine) -> None:
    """Create a table where it is missing, or the indexes that one of an earlier version lacks.

    Raises:
        LedgerError: It cannot be created.
    """
    _create(table, engine, lambda: sa.inspect(engine).has_table(table.name))
    for index in table.indexes:
        _create(index, engine, partial(_has_index, engine, index))


def _has_index(engine: sa.Engine, index: sa.Index) -> bool:
    assert index.table is not None
    return index.name in {found["name"] for found in sa.inspect(engine).get_indexes(index.table.name)}


def _create(part: sa.Table | sa.Index, engine: sa.Engine, is_there: Callable[[], bool]) -> None:
    if is_there():
        return
    try:
        part.create(engine)
    except sa.exc.DBAPIError as error:
        # Another process may have been faster.
        if not is_there():
            raise LedgerError(
                f"{part.name} cannot be created in the registry's database: {error}.",
                next_step="Let the registry's process create tables there.",
            ) from error


def put_applied_locks_on_record(engine: sa.Engine) -> None:
    """Append a row ``registered`` for each lock that was applied before there were such rows.

    In the order in which they were applied first.

    Raises:
        LedgerError: The ledger cannot be read, or others write to it all the time.
    """
    for _ in range(RACES):
        try:
            with Session(engine) as session, session.begin():
                for entry in ledger.locks_not_on_record(session):
                    ledger.append(session, entry)
            return
        except (sa.exc.IntegrityError, sa.exc.OperationalError) as error:
            lost = error  # another process was faster, and may have done all of it
    raise LedgerError(
        f"The ledger cannot be brought up to date: {lost}.", next_step="Open the registry again."
    ) from lost


RACES = 20
"""How often a transaction is repeated that lost the ledger's next row to another process."""

STEPS: tuple[Callable[[sa.Engine], None], ...] = (
    lambda engine: create(ledger.TABLE, engine),
    lambda engine: create(leases.TABLE, engine),
    put_applied_locks_on_record,
)
"""What brings the tables from one version to the next; the first makes version 1."""


def bring_up_to_date(engine: sa.Engine) -> None:
    """Create the tables, or bring those of an earlier version up to date.

    Raises:
        LedgerError: A table cannot be created, or a newer version of this package wrote them.
    """
    create(TABLE, engine)
    version = version_of(engine)
    if version > len(STEPS):
        raise LedgerError(
            f"The tables of safelock in this database are of version {version}, and this package knows "
            f"those up to version {len(STEPS)}.",
            next_step="Upgrade mlflow-safelock here to the version that wrote them.",
        )
    for number, step in enumerate(STEPS, 1):
        if number > version:
            step(engine)
            _note(engine, number)


def version_of(engine: sa.Engine) -> int:
    """Version of the tables in a database; 0 where they are missing, or older than versions are."""
    with engine.connect() as connection:
        return connection.execute(sa.select(TABLE.c.version)).scalar_one_or_none() or 0


def _note(engine: sa.Engine, version: int) -> None:
    try:
        with engine.begin() as connection:
            connection.execute(TABLE.insert().values(id=1, version=version))
    except sa.exc.IntegrityError:
        with engine.begin() as connection:
            older = TABLE.c.version < version
            connection.execute(TABLE.update().where(older).values(version=version))
