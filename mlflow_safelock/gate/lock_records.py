"""Which locks of a base there were, and in which order: the ledger's rows of registered and revoked locks."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from mlflow_safelock.errors import PromotionRefused, SafelockError
from mlflow_safelock.flavors.meta_safetylock import LOCK_FILE, LOCK_MODEL_PREFIX, lock_model_name
from mlflow_safelock.formats import lock_from_bytes
from mlflow_safelock.gate.approval import Request
from mlflow_safelock.gate.ledger import EARLIER, UNSIGNED, LockInForce
from mlflow_safelock.gate.locks import check_moves_forward
from mlflow_safelock.gate.permissions import require
from mlflow_safelock.gate.ports import ModelVersion, Registry, Target
from mlflow_safelock.gate.promotion import Gate
from mlflow_safelock.gate.promotion_rows import REGISTERED, registered_entry
from mlflow_safelock.gate.transient import is_transient, unreadable
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import LOCK_SIGNATURE_FILE, Actor, check_lock_signature

_logger = logging.getLogger(__name__)

REVOKE = Target("lock", "revoked")
"""What the ledger says a row was for that revoked a lock, or was to."""

_REGISTERED_VERSION = re.compile(r"models:/([^/@]+)/(\d+)")


def is_for_locks(name: str) -> bool:
    """Whether a registered model's name is one that locks alone have."""
    return name.startswith(LOCK_MODEL_PREFIX)


@dataclass(frozen=True)
class FoundLock:
    """A lock that is to go on record.

    Attributes:
        lock: The lock.
        is_signed: Whether it counts as signed by somebody whom a gate names that wants locks signed; also
            where none does.
    """

    lock: SafetyLock
    is_signed: bool


@dataclass(frozen=True)
class LockRecords:
    """The locks on record.

    Attributes:
        gate: The gate that applies them.
    """

    gate: Gate

    @property
    def registry(self) -> Registry:
        """The registry."""
        return self.gate.registry

    def check_new(self, name: str, source: str, workspace: str, actor: Actor) -> FoundLock:
        """Refuse to have anything registered but a lock, and one that another of its base superseded.

        Those that were registered past the gate, and are there, go on record before it: where they came.

        Args:
            name: The registered model that it becomes a version of.
            source: Where it is.
            workspace: MLflow workspace.
            actor: Who registers it.

        Returns:
            The lock.

        Raises:
            PromotionRefused: It was superseded, or is none, or one of another base, or its store, or whatever
                tells whether it is signed, does not answer now.
        """
        lock = self._only_a_lock(name, source)
        for version in self.registry.model_versions(name):
            try:
                earlier = self._earlier_lock(version)
            except SafelockError as error:
                on_record = self.registry.known_lock(workspace, name, version.version) is not None
                if is_transient(error) and not on_record:
                    raise _earlier_unreadable(name, version.version, error) from error
                _logger.info("%s version %s cannot be read as a lock: %s", name, version.version, error)
                continue
            if earlier is not None:
                self._record(earlier, name, version.version, workspace, actor, came_past_the_gate=True)
        known = self.registry.locks_of(workspace, lock.base_model)
        wants_signatures = all(rule.signature.required for rule in self.gate.policy().gates)
        check_moves_forward(lock, f"at {source}", known, self.registry, signed_only=wants_signatures)
        try:
            return FoundLock(lock, self._is_signed(lock, self._location_of(source)))
        except SafelockError as error:
            raise unreadable(error) from error

    def _earlier_lock(self, version: ModelVersion) -> FoundLock | None:
        """A registered lock; ``None`` where it is one of another base than its registered model's.

        Raises:
            SafelockError: It is none, or cannot be read, or whether it is signed cannot be told now.
        """
        lock = self._lock_at(version.location, version.name)
        if lock_model_name(lock.base_model) != version.name:
            return None
        return FoundLock(lock, self._is_signed(lock, version.location))

    def refusal_under(self, new_name: str, version: ModelVersion) -> PromotionRefused | None:
        """Why a version may not have another registered model's name; ``None`` where it may.

        A name for locks is given to locks of its base alone.
        """
        try:
            if is_for_locks(new_name):
                self._only_a_lock(new_name, version.location)
        except PromotionRefused as refusal:
            return refusal
        return None

    def put_on_record(self, found: FoundLock, name: str, version: int, workspace: str, actor: Actor) -> None:
        """Put on record that a lock was registered, unless that is already."""
        self._record(found, name, version, workspace, actor)

    def _record(
        self,
        found: FoundLock,
        name: str,
        version: int,
        workspace: str,
        actor: Actor,
        came_past_the_gate: bool = False,
    ) -> None:
        """Put a lock on record: last, or where it came if it is found with others after it.

        One that is on record gets another row where it was signed since, and for another version of it.
        """
        lock = found.lock
        applied = LockInForce(model=name, version=version, digest=lock.digest, base_model=lock.base_model)
        known = self.registry.locks_of(workspace, applied.base_model)
        before = next((entry for entry in known if entry.lock_digest == applied.digest), None)
        here = self.registry.known_lock(workspace, name, version)
        was_signed_since = before is not None and before.message == UNSIGNED and found.is_signed
        if here is not None and here.lock_digest == applied.digest and not was_signed_since:
            return
        has_later = any(entry.lock is not None and applied.is_below(entry.lock) for entry in known)
        reason = EARLIER if came_past_the_gate and has_later else None
        message = None if found.is_signed else UNSIGNED
        request = Request(name, version, REGISTERED, actor, workspace)
        self.registry.record(registered_entry(request, self.gate.policy(), applied, reason, message))

    def _is_signed(self, lock: SafetyLock, location: str) -> bool:
        """Whether somebody signed a lock whom a gate names that wants locks signed; also where none does.

        Raises:
            SafelockError: That cannot be told now.
        """
        rules = [rule.signature for rule in self.gate.policy().gates if rule.signature.required]
        if not rules:
            return True
        signatories = tuple(one for rule in rules for one in rule.signatories)
        reader = self.gate.artifacts.reader(self.gate.artifacts.resolve(location))
        try:
            if LOCK_SIGNATURE_FILE not in {file.path for file in reader.files()}:
                return False
            check_lock_signature(reader.read(LOCK_SIGNATURE_FILE), lock, signatories, origin=location)
        except SafelockError as error:
            if is_transient(error):
                raise
            _logger.info("The lock at %s counts as unsigned: %s", location, error)
            return False
        return True

    def revoke(
        self,
        name: str,
        version: int,
        workspace: str,
        actor: Actor,
        reason: str,
        digest: str | None = None,
    ) -> LockInForce:
        """Put on record that a registered lock may not be applied any more.

        Args:
            name: The registered model.
            version: Its version.
            workspace: MLflow workspace.
            actor: Who revokes it.
            reason: Why.
            digest: Which lock, where another one has that name and version by now.

        Raises:
            PromotionRefused: The policy forbids it, it is no lock, or was revoked already; a row in the
                ledger says so.
        """
        request = Request(name, version, REVOKE, actor, workspace)
        try:
            require(self.gate.policy().revoke, actor, "revoke_denied", "revoke a lock", "revoke")
            applied = self._registered_as(name, version, workspace, digest)
            if self.registry.revocation_of(applied.digest) is not None:
                raise PromotionRefused(
                    "already_revoked", f"The lock {name!r} version {version} is revoked already."
                )
        except PromotionRefused as refusal:
            self.gate.reject(request, self.gate.policy(), refusal)
            raise
        policy = self.gate.policy()
        self.registry.record(request.row("revoked", policy, reason="revoked", message=reason, lock=applied))
        return applied

    def _registered_as(self, name: str, version: int, workspace: str, digest: str | None) -> LockInForce:
        """The lock that is registered as a version, or was before it was deleted."""
        known = self.registry.known_lock(workspace, name, version, digest)
        is_there = version in {found.version for found in self.registry.model_versions(name)}
        if known is not None and known.lock is not None and (digest is not None or not is_there):
            return known.lock
        found = self.registry.model_version(name, version)
        try:
            lock = self._lock_at(found.location, f"models:/{name}/{version}")
        except SafelockError as error:
            raise PromotionRefused(
                "no_lock", f"{name!r} version {version} is no lock: {error.cause}"
            ) from error
        if digest not in (None, lock.digest):
            raise PromotionRefused(
                "no_lock", f"{name!r} version {version} is the lock {lock.digest}, and was never {digest}."
            )
        return LockInForce(model=name, version=version, digest=lock.digest, base_model=lock.base_model)

    def _only_a_lock(self, name: str, source: str) -> SafetyLock:
        """The lock at a source, which belongs under a registered model's name."""
        try:
            lock = self._lock_at(self._location_of(source), source)
        except SafelockError as error:
            if is_transient(error):
                raise unreadable(error) from error
            raise PromotionRefused(
                "no_lock",
                f"Names like {name!r} are for locks alone, and what is at {source} is none: {error.cause}",
                next_step=f"Choose a name that does not begin with {LOCK_MODEL_PREFIX!r}.",
            ) from error
        if lock_model_name(lock.base_model) != name:
            raise PromotionRefused(
                "no_lock",
                f"What is at {source} is a lock of {lock.base_model!r}, and {name!r} is not for those.",
                next_step=f"Register it as {lock_model_name(lock.base_model)!r}: safelock lock register.",
            )
        return lock

    def _location_of(self, source: str) -> str:
        """Where a source lies, that of a registered version where it names one."""
        named = _REGISTERED_VERSION.fullmatch(source)
        if named is None:
            return source
        there = {found.version: found for found in self.registry.model_versions(named[1])}
        found: ModelVersion | None = there.get(int(named[2]))
        return source if found is None else found.location

    def _lock_at(self, location: str, origin: str) -> SafetyLock:
        artifacts = self.gate.artifacts
        return lock_from_bytes(artifacts.reader(artifacts.resolve(location)).read(LOCK_FILE), origin=origin)


def _earlier_unreadable(name: str, version: int, error: SafelockError) -> PromotionRefused:
    return PromotionRefused(
        "unreachable",
        f"Which lock version {version} of {name!r} is, and whether it is signed, cannot be told now: "
        f"{error.cause}",
        next_step="Do it again in a while; if its store is gone for good, delete that version.",
    )
