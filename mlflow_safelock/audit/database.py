"""An audit of a registry's database: its versions, and the ledger beside them. It only reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from mlflow.entities.model_registry.model_version_stages import STAGE_DELETED_INTERNAL, STAGE_NONE
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.store.db.utils import create_sqlalchemy_engine
from mlflow.store.model_registry.dbmodels.models import (
    SqlModelVersion,
    SqlModelVersionTag,
    SqlRegisteredModel,
    SqlRegisteredModelAlias,
    SqlRegisteredModelTag,
)
from sqlalchemy.orm import Session

from mlflow_safelock.audit.aging_locks import LockReader, faults_of_lock
from mlflow_safelock.audit.rows import (
    AuditRow,
    Evidence,
    RegisteredVersion,
    row_of,
    row_without_evidence,
)
from mlflow_safelock.errors import LedgerError, SourceError
from mlflow_safelock.gate import ledger
from mlflow_safelock.gate.guard import fault_of
from mlflow_safelock.gate.ledger import LockInForce
from mlflow_safelock.gate.policy import LockRule, Policy
from mlflow_safelock.gate.source import PROMPT_SOURCE
from mlflow_safelock.lock import SafetyLock

SCHEME_PREFIX = "safelock+"
"""What makes MLflow put the gate in front of a database; the database is the same without it."""

# The plain tables: mapped classes would set up relations of all of MLflow's tables, and load them row by row.
_VERSIONS: sa.Table = SqlModelVersion.__table__
_TAGS: sa.Table = SqlModelVersionTag.__table__
_ALIASES: sa.Table = SqlRegisteredModelAlias.__table__
_MODEL_TAGS: sa.Table = SqlRegisteredModelTag.__table__
_MODELS: sa.Table = SqlRegisteredModel.__table__

_PACKAGES = {
    "MySQLdb": "mysqlclient",
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
}
"""The package that a database driver comes in, by its module, where the two have different names."""

_Key = tuple[str, str, int]


def is_database(registry_uri: str) -> bool:
    """Whether a registry URI names a database, with or without the gate in front."""
    scheme = registry_uri.removeprefix(SCHEME_PREFIX).partition(":")[0]
    return scheme.partition("+")[0] in DATABASE_ENGINES


def database_rows(
    registry_uri: str,
    is_wanted: Callable[[str], bool],
    policy: Policy | None = None,
    read_lock: LockReader | None = None,
) -> Iterator[AuditRow]:
    """A row for every version in the registry's database, of all workspaces, by workspace, name and version.

    Args:
        registry_uri: The database, with or without the prefix ``safelock+``.
        is_wanted: Whether a registered model of this name is wanted.
        policy: The policy that the versions are held to; to none where not given.
        read_lock: Reads registered locks, which say how old they are; where not given, that is not looked at.

    Raises:
        LedgerError: The database is not there, holds no registry, or cannot be read.
    """
    with _reading(registry_uri) as (session, has_ledger):
        # The tags that gates of the policy are for, beside those that the gate sets.
        keys = {key for gate in policy.gates for key in gate.tags} if policy is not None else set()
        versions = [version for version in _versions(session, keys) if is_wanted(version.name)]
        for version in versions:
            row = _row(session, version) if has_ledger else row_without_evidence(version)
            yield _held_to(policy, row, version, session if has_ledger else None, read_lock)


def registered_versions(registry_uri: str) -> list[RegisteredVersion]:
    """Every version in the registry's database, of all workspaces; without the tags of people.

    Raises:
        LedgerError: The database is not there, holds no registry, or cannot be read.
    """
    with _reading(registry_uri) as (session, _):
        return _versions(session, ())


@contextmanager
def _reading(registry_uri: str) -> Iterator[tuple[Session, bool]]:
    """A session of a registry's database, and whether there is a ledger in it."""
    engine = open_database(registry_uri)
    url = engine.url
    try:
        with Session(engine) as session:
            tables = sa.inspect(engine)
            if not tables.has_table(_VERSIONS.name):
                raise LedgerError(f"There is no model registry in the database {url!r}.", next_step=_NEXT)
            yield session, tables.has_table(ledger.TABLE.name)
    except sa.exc.SQLAlchemyError as error:
        raise LedgerError(
            f"The registry's database {url!r} cannot be read: {error.args[0] if error.args else error}.",
            next_step="Check the address; if the tables are of an older MLflow, run: mlflow db upgrade.",
        ) from error
    finally:
        engine.dispose()


def open_database(registry_uri: str) -> sa.Engine:
    """The database of a registry, as it is: nothing is written by opening it, and nothing connected yet.

    Args:
        registry_uri: The database, with or without the prefix ``safelock+``.

    Raises:
        LedgerError: It is no URI of a database, there is no such file, or its driver is not installed.
    """
    try:
        url = sa.make_url(registry_uri.removeprefix(SCHEME_PREFIX))
    except sa.exc.ArgumentError as error:
        # Not shown: it may hold a password.
        raise LedgerError("The registry URI is not one of a database.", next_step=_NEXT) from error
    _refuse_missing_file(url)
    try:
        engine: sa.Engine = create_sqlalchemy_engine(url.render_as_string(hide_password=False))
    except ModuleNotFoundError as error:
        raise LedgerError(
            f"The driver of the database {url!r} is not installed: {error}.",
            next_step=f"Install it: pip install '{_PACKAGES.get(str(error.name), error.name)}'",
        ) from error
    return engine


def _refuse_missing_file(url: sa.URL) -> None:
    """Opening a sqlite file that is not there would make an empty one."""
    path = url.database or ""
    if url.get_backend_name() == "sqlite" and not path.startswith("file:") and not Path(path).is_file():
        raise LedgerError(f"There is no database at {url!r}.", next_step=_NEXT)


_NEXT = "Name the registry: --registry-uri or MLFLOW_REGISTRY_URI, such as sqlite:///registry.db or http://…"


def _row(session: Session, version: RegisteredVersion) -> AuditRow:
    try:
        entry = ledger.promotion_at(session, version.location)
    except LedgerError as error:
        return row_without_evidence(version, "unknown", error.cause)
    if entry is None:
        return row_without_evidence(version)
    return row_of(version, Evidence.from_ledger(entry))


def _held_to(
    policy: Policy | None,
    row: AuditRow,
    version: RegisteredVersion,
    ledger_session: Session | None,
    read_lock: LockReader | None,
) -> AuditRow:
    """The row, with what is wrong where the version is in a gated place: with it, and with its lock."""
    found = version.as_the_gate_sees_it
    rule = policy.rule_for(found.name, found.tags, found.model_tags) if policy is not None else None
    if rule is None or not rule.gated_places(found):
        return row
    if ledger_session is not None:
        row = replace(row, lock_faults=tuple(_lock_faults(ledger_session, row, rule.lock, read_lock)))
    try:
        decision = (
            None
            if ledger_session is None
            else ledger.decision_on(ledger_session, version.workspace, found.name, found.version)
        )
    except LedgerError as error:
        return replace(row, violation=f"What was decided about it cannot be read: {error.cause}")
    fault = fault_of(found, rule, decision)
    return row if fault is None else replace(row, violation=f"It {fault}")


def _lock_faults(
    session: Session, row: AuditRow, rule: LockRule, read_lock: LockReader | None
) -> Iterator[str]:
    """Why the lock that a version runs would not be applied today; none where no lock is on record."""
    if None in (row.lock_name, row.lock_version, row.lock_digest, row.base_model):
        return
    applied = LockInForce(
        model=str(row.lock_name),
        version=int(row.lock_version or 0),
        digest=str(row.lock_digest),
        base_model=str(row.base_model),
    )

    def registered(read: LockReader) -> SafetyLock:
        at = session.execute(
            sa.select(sa.func.coalesce(_VERSIONS.c.storage_location, _VERSIONS.c.source)).where(
                _VERSIONS.c.workspace == row.workspace,
                _VERSIONS.c.name == applied.model,
                _VERSIONS.c.version == applied.version,
            )
        ).scalar_one_or_none()
        if not at:
            raise SourceError("It is registered no more.")
        return read(at)

    revocation, first = None, applied.version
    try:
        revocation = ledger.revocation_of(session, applied.digest)
        known = ledger.known_lock(session, row.workspace, applied.model, applied.version, applied.digest)
        if known is not None:
            first = min(first, known.version)
    except LedgerError as error:
        yield f"Whether its lock was revoked cannot be read: {error.cause}"
    yield from faults_of_lock(
        applied, first, rule, revocation, None if read_lock is None else partial(registered, read_lock)
    )


def _versions(session: Session, keys: Collection[str]) -> list[RegisteredVersion]:
    """Every version that is not deleted.

    They are read before the ledger, so that whatever was redirected has its row by then.
    """
    aliases = _aliases(session)
    tags, model_tags = _tags(session, keys), _model_tags(session, keys)
    rows = session.execute(
        _with_names(_VERSIONS)
        .where(
            sa.func.coalesce(_VERSIONS.c.current_stage, "") != STAGE_DELETED_INTERNAL,
            sa.func.coalesce(_VERSIONS.c.source, "") != PROMPT_SOURCE,
        )
        .order_by(_VERSIONS.c.workspace, _MODELS.c.name, _VERSIONS.c.version)
    )
    return [
        RegisteredVersion(
            workspace=row.workspace,
            name=row.model,
            version=row.version,
            stage=row.current_stage or STAGE_NONE,
            aliases=tuple(sorted(aliases.get((row.workspace, row.model, row.version), ()))),
            source=row.source or "",
            location=row.storage_location or row.source or "",
            tags=tags.get((row.workspace, row.model, row.version), {}),
            model_tags=model_tags.get((row.workspace, row.model), {}),
        )
        for row in rows
    ]


def _with_names(table: sa.Table) -> sa.Select[Any]:
    """Rows of a table about registered models, with the model's own name as the column ``model``.

    A database that takes ``BOT`` for ``bot`` keeps the spelling that each row was written with.
    """
    is_about = sa.and_(_MODELS.c.workspace == table.c.workspace, _MODELS.c.name == table.c.name)
    name = sa.func.coalesce(_MODELS.c.name, table.c.name)
    return sa.select(table, name.label("model")).outerjoin(_MODELS, is_about)


def _aliases(session: Session) -> dict[_Key, list[str]]:
    found: dict[_Key, list[str]] = {}
    for row in session.execute(_with_names(_ALIASES)):
        found.setdefault((row.workspace, row.model, row.version), []).append(row.alias)
    return found


def _tags(session: Session, keys: Collection[str]) -> dict[_Key, dict[str, str]]:
    """The tags that the audit looks at: the gate's own, and those with these keys."""
    found: dict[_Key, dict[str, str]] = {}
    wanted = sa.or_(_TAGS.c.key.startswith("safelock."), _TAGS.c.key.in_(keys))
    for row in session.execute(_with_names(_TAGS).where(wanted)):
        found.setdefault((row.workspace, row.model, row.version), {})[row.key] = row.value
    return found


def _model_tags(session: Session, keys: Collection[str]) -> dict[tuple[str, str], dict[str, str]]:
    """The tags of registered models with these keys."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in session.execute(_with_names(_MODEL_TAGS).where(_MODEL_TAGS.c.key.in_(keys))):
        found.setdefault((row.workspace, row.model), {})[row.key] = row.value
    return found
