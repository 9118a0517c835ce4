"""Which locks that versions run would be applied to them no more: revoked, below the floor, or too old."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlflow_safelock.errors import LockError, SourceError
from mlflow_safelock.flavors.meta_safetylock import LOCK_FILE
from mlflow_safelock.formats import lock_from_bytes
from mlflow_safelock.gate.ledger import LedgerEntry, LockInForce
from mlflow_safelock.gate.policy import LockRule
from mlflow_safelock.lock import SafetyLock

LockReader = Callable[[str], SafetyLock]
"""Reads the registered lock at a location; raises ``SourceError`` or ``LockError`` where it cannot."""


def faults_of_lock(
    applied: LockInForce,
    first: int,
    rule: LockRule,
    revocation: LedgerEntry | None,
    registered: Callable[[], SafetyLock] | None,
) -> Iterator[str]:
    """Why a lock that a version runs would not be applied by a promotion today, one sentence each.

    Args:
        applied: The lock, as the version's promotion has it.
        first: The version that it was registered as first, which is what the policy's floor is held against.
        rule: Which locks are good enough where the version is.
        revocation: The lock's revocation; ``None`` where it stands.
        registered: Gives the lock as it is registered, which says how old it is, and is asked only where the
            policy says how old it may be; where not given, age is not looked at.
    """
    title = f"lock {applied.model} version {applied.version}"
    if revocation is not None:
        yield f"It runs {title}, which was revoked at {revocation.time}: {revocation.message}"
    if first < rule.min_version:
        was = "" if first == applied.version else f", registered as version {first} first"
        yield f"It runs {title}{was}, and the policy asks for version {rule.min_version} or later."
    if rule.max_age_days is None or registered is None:
        return
    try:
        created = _created(applied, registered())
    except (LockError, SourceError) as error:
        yield f"It runs {title}, and whether that is too old cannot be told: {error.cause}"
        return
    if created is None:
        yield f"It runs {title}, which does not say when it was made."
    elif datetime.now(UTC) - created > timedelta(days=rule.max_age_days):
        yield (
            f"It runs {title}, which was made {created.isoformat()}, and the policy takes none older than "
            f"{rule.max_age_days} days."
        )


def _created(applied: LockInForce, registered: SafetyLock) -> datetime | None:
    if registered.digest != applied.digest:
        raise LockError("What is registered there now is another lock.")
    created = registered.metadata.created
    return None if created is None else datetime.fromisoformat(created)


def lock_reader(tracking_uri: str | None) -> LockReader:
    """What reads registered locks with the rights of whoever audits; each location once.

    Args:
        tracking_uri: Where proxied artifacts are fetched through; MLflow's current one where not given.
    """

    @cache
    def read(location: str) -> SafetyLock:
        with TemporaryDirectory(prefix="safelock-audit-") as temporary:
            try:
                repository = get_artifact_repository(location, tracking_uri=tracking_uri)
                data = Path(repository.download_artifacts(LOCK_FILE, temporary)).read_bytes()
            except Exception as error:  # each kind of store raises its own
                raise SourceError(f"The lock at {location} cannot be read: {error}.") from error
        return lock_from_bytes(data, origin=f"{location}/{LOCK_FILE}")

    return read
