"""The gate's view of an SQL registry store, and the one transaction that redirects a version."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa
from mlflow.entities.model_registry.model_version_stages import STAGE_DELETED_INTERNAL, STAGE_NONE
from mlflow.entities.model_registry.model_version_status import ModelVersionStatus
from mlflow.exceptions import MlflowException
from mlflow.store.model_registry.dbmodels.models import (
    SqlModelVersion,
    SqlModelVersionTag,
    SqlRegisteredModelAlias,
)
from mlflow.utils.time import get_current_time_millis

from mlflow_safelock.errors import LedgerError, PromotionRefused
from mlflow_safelock.gate import leases, ledger
from mlflow_safelock.gate.failpoints import reach
from mlflow_safelock.gate.leases import Lease, Work
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.ports import ModelVersion, Redirection, Withdrawal

_logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 15.0
"""Seconds after which a transaction that lost its races for the ledger's next row is not repeated again."""

LONGEST_WAIT = 90.0
"""Seconds that a request waits for another one to finish with the same version; MLflow's client waits 120."""

READY = ModelVersionStatus.to_string(ModelVersionStatus.READY)


@dataclass(frozen=True)
class SqlRegistry:
    """The registry behind an MLflow SQL store.

    Attributes:
        store: MLflow's ``SqlAlchemyStore`` or its workspace-aware sibling.
    """

    store: Any

    def model_version(self, name: str, version: int) -> ModelVersion:
        """One version; MLflow's own error where there is none."""
        with self.store.ManagedSessionMaker() as session:
            return _view(self.store._get_sql_model_version(session, name, version))

    def model_versions(self, name: str) -> Sequence[ModelVersion]:
        """All ready versions of a registered model, oldest first."""
        with self.store.ManagedSessionMaker() as session:
            rows = (
                self.store._get_query(session, SqlModelVersion)
                .filter(
                    SqlModelVersion.name == name,
                    SqlModelVersion.current_stage != STAGE_DELETED_INTERNAL,
                    SqlModelVersion.status == READY,
                )
                .order_by(SqlModelVersion.version)
            )
            return [_view(row) for row in rows]

    def newest_withdrawn(self, name: str) -> int:
        """Number of the newest deleted version of a registered model, which MLflow keeps a row of; or 0."""
        with self.store.ManagedSessionMaker() as session:
            newest = (
                self.store._get_query(session, SqlModelVersion)
                .filter(SqlModelVersion.name == name, SqlModelVersion.current_stage == STAGE_DELETED_INTERNAL)
                .order_by(SqlModelVersion.version.desc())
                .first()
            )
            return 0 if newest is None else int(newest.version)

    def promotion_at(self, location: str) -> LedgerEntry | None:
        """The promotion that wrote the locked model at ``location``, where the ledger knows one."""
        return self._from_ledger(lambda session: ledger.promotion_at(session, location))

    def decision_on(self, workspace: str, name: str, version: int) -> LedgerEntry | None:
        """What was decided last about a version, refusals aside."""
        return self._from_ledger(lambda session: ledger.decision_on(session, workspace, name, version))

    def revocation_of(self, digest: str) -> LedgerEntry | None:
        """The revocation of the lock with a digest."""
        return self._from_ledger(lambda session: ledger.revocation_of(session, digest))

    def locking_entries(self) -> Sequence[LedgerEntry]:
        """Every row of the ledger by which a version was locked, oldest first."""
        return self._from_ledger(ledger.locking_entries)

    def works_held(self) -> Sequence[Work]:
        """What somebody is at work on now."""
        with self.store.ManagedSessionMaker() as session:
            return leases.held(session)

    def _from_ledger(self, read: Callable[[Any], T]) -> T:
        """Rows of the ledger; one that was edited is an error of ours, which MLflow's session wraps."""
        try:
            with self.store.ManagedSessionMaker() as session:
                return read(session)
        except MlflowException as error:
            if isinstance(error.__cause__, LedgerError):
                raise error.__cause__ from error
            raise

    def record_policy(self, entry: LedgerEntry) -> None:
        """Append that a policy came into force, where the last that did is another."""

        def work(session: Any) -> None:
            if ledger.last_policy(session) != entry.policy:
                ledger.append(session, entry)

        self._transaction(work)

    @contextmanager
    def lease(self, work: Work) -> Iterator[Lease]:
        """Be the one who is at work on a version, once whoever is now has finished, died or is late."""
        holder = leases.new_holder()
        deadline = time.monotonic() + LONGEST_WAIT
        while other := self._transaction(lambda session: leases.take(session, work, holder)):
            if time.monotonic() > deadline:
                raise PromotionRefused(
                    "conflict",
                    f"{work.model!r} version {work.version} is still being worked on by "
                    f"{leases.process_of(other)}.",
                    next_step="Do it again once that is done.",
                )
            time.sleep(random.uniform(0.02, 0.1))  # noqa: S311 - spreads requests, guards nothing
        lease = Lease(holder, lambda: self._transaction(lambda session: leases.renew(session, work, holder)))
        try:
            yield lease
        finally:
            if not lease.over:
                self._give_back(holder)

    def redirect(self, redirection: Redirection) -> bool:
        """Redirect a version, tag it and append to the ledger, in one transaction or not at all."""

        def work(session: Any) -> bool:
            reach("transaction-begun")
            # The condition in the statement itself takes the row's lock and decides a race in one step.
            updated = session.execute(
                sa.update(SqlModelVersion)
                .where(*self._is_at(redirection.name, redirection.version, redirection.expected_location))
                .values(storage_location=redirection.location, last_updated_time=get_current_time_millis())
            )
            if updated.rowcount != 1:
                return False
            reach("redirected")
            self._set_tags(session, redirection)
            _finish(session, redirection)
            return True

        return self._end_with(redirection.lease, work)

    def withdraw(self, withdrawal: Withdrawal) -> bool:
        """Take a version out of its stage and aliases and append to the ledger, in one transaction or not."""
        found = withdrawal.found

        def work(session: Any) -> bool:
            reach("transaction-begun")
            now = {"last_updated_time": get_current_time_millis()}
            stage = {"current_stage": STAGE_NONE} if withdrawal.leaves_stage else {}
            updated = session.execute(
                sa.update(SqlModelVersion)
                .where(
                    *self._is_at(found.name, found.version, found.location),
                    SqlModelVersion.current_stage == found.stage,
                )
                .values(**stage, **now)
            )
            if updated.rowcount != 1:
                return False
            reach("withdrawn")
            session.execute(
                sa.delete(SqlRegisteredModelAlias).where(
                    SqlRegisteredModelAlias.workspace == self.store._get_active_workspace(),
                    SqlRegisteredModelAlias.name == found.name,
                    SqlRegisteredModelAlias.version == found.version,
                    SqlRegisteredModelAlias.alias.in_(withdrawal.aliases),
                )
            )
            _finish(session, withdrawal)
            return True

        return self._end_with(withdrawal.lease, work)

    def _is_at(self, name: str, version: int, location: str) -> tuple[Any, ...]:
        """Conditions of a version that is there and downloaded from a location."""
        return (
            SqlModelVersion.workspace == self.store._get_active_workspace(),
            SqlModelVersion.name == name,
            SqlModelVersion.version == version,
            SqlModelVersion.current_stage != STAGE_DELETED_INTERNAL,
            sa.func.coalesce(SqlModelVersion.storage_location, SqlModelVersion.source) == location,
        )

    def _end_with(self, lease: Lease | None, work: Callable[[Any], bool]) -> bool:
        """Do the transaction that a lease ends with; whether it was done."""
        done = self._transaction(work)
        if done and lease is not None:
            lease.over = True
        reach("committed")
        return done

    def _give_back(self, holder: str) -> None:
        try:
            self._transaction(lambda session: leases.release(session, holder))
        except (LedgerError, MlflowException) as error:
            _logger.warning("A lease stays until it expires: %s", error)

    def _set_tags(self, session: Any, redirection: Redirection) -> None:
        # In two statements; merging them one by one asks for each of them first.
        session.execute(
            sa.delete(SqlModelVersionTag).where(
                SqlModelVersionTag.workspace == self.store._get_active_workspace(),
                SqlModelVersionTag.name == redirection.name,
                SqlModelVersionTag.version == redirection.version,
                SqlModelVersionTag.key.in_(redirection.tags),
            )
        )
        session.add_all(
            self.store._with_workspace_field(
                SqlModelVersionTag(name=redirection.name, version=redirection.version, key=key, value=value)
            )
            for key, value in redirection.tags.items()
        )

    def record(self, *entries: LedgerEntry) -> None:
        """Append rows to the ledger, all of them or none."""
        self._transaction(lambda session: _append(session, entries))

    def _transaction(self, work: Callable[[Any], T]) -> T:
        """Run ``work`` in a transaction, again where another writer took the ledger's next row first."""

        def transaction() -> T:
            with self.store.ManagedSessionMaker(read_only=False) as session:
                result = work(session)
                session.flush()
                return result

        return patiently(transaction, sa.exc.IntegrityError, sa.exc.OperationalError)


def patiently(work: Callable[[], T], *lost_races: type[sa.exc.DBAPIError]) -> T:
    """Do something of a store's, again where another writer was in the way.

    sqlite gives up when it waits too long for its one writer, and PostgreSQL when two transactions wait for
    each other. MLflow has a 5xx for both, which its own client repeats for minutes.

    Args:
        work: What to do, in a transaction of its own.
        lost_races: The errors of the database by which it is told that another writer was in the way.

    Raises:
        LedgerError: Others were in the way for longer than ``PATIENCE``.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return work()
        except MlflowException as error:
            if not isinstance(error.__cause__, lost_races):
                raise
            if time.monotonic() > deadline:
                raise LedgerError(
                    f"The registry's database was busy for more than {PATIENCE:g} seconds: "
                    f"{error.__cause__}.",
                    next_step="Do it again.",
                ) from error
            time.sleep(random.uniform(0.005, 0.05))  # noqa: S311 - spreads writers, guards nothing


def _append(session: Any, entries: Iterable[LedgerEntry]) -> None:
    for entry in entries:
        ledger.append(session, entry)


def _finish(session: Any, change: Redirection | Withdrawal) -> None:
    """What every change of a version ends with: rows of the ledger, and the end of its lease."""
    _append(session, change.entries)
    if change.lease is not None:
        leases.release(session, change.lease.holder)
    reach("ledger-appended")


def _view(row: Any) -> ModelVersion:
    return ModelVersion(
        name=row.name,
        version=row.version,
        source=row.source,
        location=row.storage_location or row.source,
        tags={tag.key: tag.value for tag in row.model_version_tags},
        stage=row.current_stage,
        aliases=tuple(
            sorted(
                alias.alias
                for alias in row.registered_model.registered_model_aliases
                if alias.version == row.version
            )
        ),
        model_tags={tag.key: tag.value for tag in row.registered_model.registered_model_tags},
    )
