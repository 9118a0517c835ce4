"""The ledger and the leases in an SQL database, reached as MLflow reaches its own."""

from __future__ import annotations

import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
from mlflow.exceptions import MlflowException

from mlflow_safelock.errors import LedgerError, PromotionRefused
from mlflow_safelock.gate import leases, ledger
from mlflow_safelock.gate.failpoints import reach
from mlflow_safelock.gate.leases import Lease, Work
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.ports import Redirection, Withdrawal

_logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 15.0
"""Seconds after which a transaction that lost its races for the ledger's next row is not repeated again."""

LONGEST_WAIT = 90.0
"""Seconds that a request waits for another one to finish with the same version; MLflow's client waits 120."""


class SqlLedger(ABC):
    """What is decided and who is at work, by the tables of this package; what a registry has beside that."""

    @abstractmethod
    def _session(self, *, read_only: bool = True) -> AbstractContextManager[Any]:
        """A session of MLflow's making, which commits at its end and wraps what the database raises."""

    def promotion_at(self, location: str) -> LedgerEntry | None:
        """The promotion that wrote the locked model at ``location``, where the ledger knows one."""
        return self._from_ledger(lambda session: ledger.promotion_at(session, location))

    def decision_on(self, workspace: str, name: str, version: int) -> LedgerEntry | None:
        """What was decided last about a version, refusals aside."""
        return self._from_ledger(lambda session: ledger.decision_on(session, workspace, name, version))

    def is_unlocked(self, workspace: str, name: str, version: int) -> bool:
        """Whether the lock of a version was taken off last, or somebody is at that now."""

        def read(session: Any) -> bool:
            # In this order: what ended between both readings has its row in the ledger.
            if leases.is_held(session, Work(workspace, name, version, "unlock")):
                return True
            decision = ledger.decision_on(session, workspace, name, version)
            return decision is not None and decision.event == "unlocked"

        return self._from_ledger(read)

    def locks_of(self, workspace: str, base: str) -> Sequence[LedgerEntry]:
        """The rows by which the locks of a base model became known, oldest first."""
        return self._from_ledger(lambda session: ledger.locks_of(session, workspace, base))

    def known_lock(
        self, workspace: str, name: str, version: int, digest: str | None = None
    ) -> LedgerEntry | None:
        """The row by which a registered lock became known, though it be deleted since."""
        return self._from_ledger(lambda session: ledger.known_lock(session, workspace, name, version, digest))

    def ledger_identity(self) -> str:
        """What tells this ledger from others: the digest of its first row, zeros while it has none."""
        return self._from_ledger(ledger.identity)

    def writing_of(self, location: str) -> LedgerEntry | None:
        """The last writing of a standalone model at ``location``."""
        return self._from_ledger(lambda session: ledger.writing_of(session, location))

    def revocation_of(self, digest: str) -> LedgerEntry | None:
        """The revocation of the lock with a digest."""
        return self._from_ledger(lambda session: ledger.revocation_of(session, digest))

    def locking_entries(self) -> Sequence[LedgerEntry]:
        """Every row of the ledger by which a version was locked, oldest first."""
        return self._from_ledger(ledger.locking_entries)

    def last_refusal(self, workspace: str, name: str, version: int, target: str) -> LedgerEntry | None:
        """The last row by which a version was refused what a target stands for."""
        return self._from_ledger(
            lambda session: ledger.last_refusal(session, workspace, name, version, target)
        )

    def works_held(self) -> Sequence[Work]:
        """What somebody is at work on now."""
        with self._session() as session:
            return leases.held(session)

    def _from_ledger(self, read: Callable[[Any], T]) -> T:
        """Rows of the ledger; one that was edited is an error of ours, which MLflow's session wraps."""
        try:
            with self._session() as session:
                return read(session)
        except MlflowException as error:
            if isinstance(error.__cause__, LedgerError):
                raise error.__cause__ from error
            raise

    def preparation_of(self, original: str) -> LedgerEntry | None:
        """The last measuring of the fine-tune at ``original``."""
        with self._session() as session:
            return ledger.preparation_of(session, original)

    def evaluations_of(self, original: str) -> Sequence[LedgerEntry]:
        """Every evaluation on record of the fine-tune at a place, newest first."""
        with self._session() as session:
            return ledger.evaluations_of(session, original)

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
                    f"{work} is still being worked on by {leases.process_of(other)}.",
                    next_step="Do it again once that is done.",
                )
            time.sleep(random.uniform(0.02, 0.1))  # noqa: S311 - spreads requests, guards nothing
        lease = Lease(holder, lambda: self._transaction(lambda session: leases.renew(session, work, holder)))
        try:
            yield lease
        finally:
            if not lease.over:
                self._give_back(holder)

    def _end_with(self, lease: Lease | None, work: Callable[[Any], bool]) -> bool:
        """Do the transaction that a lease ends with; whether it was done.

        Raises:
            PromotionRefused: So the transaction itself decided, and was rolled back.
        """
        try:
            done = self._transaction(work)
        except MlflowException as error:
            if isinstance(error.__cause__, PromotionRefused):
                raise error.__cause__ from error
            raise
        if done and lease is not None:
            lease.over = True
        reach("committed")
        return done

    def _give_back(self, holder: str) -> None:
        try:
            self._transaction(lambda session: leases.release(session, holder))
        except (LedgerError, MlflowException) as error:
            _logger.warning("A lease stays until it expires: %s", error)

    def record(self, *entries: LedgerEntry) -> None:
        """Append rows to the ledger, all of them or none."""
        self._transaction(lambda session: append_rows(session, entries))

    def _transaction(self, work: Callable[[Any], T]) -> T:
        """Run ``work`` in a transaction, again where another writer took the ledger's next row first."""

        def transaction() -> T:
            with self._session(read_only=False) as session:
                result = work(session)
                session.flush()
                return result

        return patiently(transaction, sa.exc.IntegrityError, sa.exc.OperationalError)


def patiently(work: Callable[[], T], *lost_races: type[sa.exc.SQLAlchemyError]) -> T:
    """Do something of a store's, again where another writer was in the way.

    sqlite gives up when it waits too long for its one writer, and PostgreSQL when two transactions wait for
    each other. MLflow has a 5xx for both, which its own client repeats for minutes.

    Args:
        work: What to do, in a transaction of its own.
        lost_races: The errors of the database, or of SQLAlchemy, by which it is told that another writer was
            in the way.

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


def append_rows(session: Any, entries: Iterable[LedgerEntry]) -> None:
    """Append rows to the ledger, in a session's transaction."""
    for entry in entries:
        ledger.append(session, entry)


def finish(session: Any, change: Redirection | Withdrawal) -> None:
    """What every change of a version ends with: rows of the ledger, and the end of its lease.

    Raises:
        PromotionRefused: The lock that would be in force was revoked meanwhile, or nobody can see any more
            that this is going on.
    """
    append_rows(session, change.entries)
    if isinstance(change, Redirection) and change.sign is not None:
        _check_seen(session, change.sign)
    if isinstance(change, Redirection) and change.applies is not None:
        # After the rows were appended: a revocation that comes now loses the race for the next row's number.
        _check_not_revoked(session, change.applies)
    if change.lease is not None:
        leases.release(session, change.lease.holder)
    reach("ledger-appended")


def _check_seen(session: Any, sign: Lease) -> None:
    if not leases.lasts(session, sign.holder):
        raise PromotionRefused(
            "conflict",
            "It took longer than others wait for it, and a promotion may have come by in that time.",
            next_step="Do it again.",
        )


def _check_not_revoked(session: Any, digest: str) -> None:
    revoked = ledger.revocation_of(session, digest)
    if revoked is not None:
        raise PromotionRefused(
            "lock_revoked",
            f"The lock {revoked.model} version {revoked.version} was revoked at {revoked.time}, while it was "
            f"being applied: {revoked.message}",
            next_step="Register another lock for this base: safelock forge, then safelock lock register.",
        )
