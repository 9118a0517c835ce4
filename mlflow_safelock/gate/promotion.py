"""The decision: one promotion from the request to a locked version, or to a refusal that changes nothing.

Order of steps: policy; source (never a locked one); base and lock; the overlay, written beside the source and
read back; one database transaction for the redirection, the tags and the ledger row. Stock MLflow performs
the transition afterwards. A crash between any two steps leaves the version not promoted, or locked and not
promoted, and doing it again finishes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow_safelock.errors import PromotionRefused, SafelockError
from mlflow_safelock.flavors.overlay import read_overlay, write_overlay
from mlflow_safelock.gate.ledger import LedgerEntry, LockInForce
from mlflow_safelock.gate.locks import RegisteredLock, find_lock
from mlflow_safelock.gate.policy import GateRule, Policy
from mlflow_safelock.gate.ports import Artifacts, ModelVersion, Redirection, Registry, Target
from mlflow_safelock.gate.source import examine
from mlflow_safelock.provenance import Actor, LockReference, Promotion, Receipt

_logger = logging.getLogger(__name__)

MAX_LOCATION = 500
"""Longest download location that MLflow's table holds, in characters."""


@dataclass(frozen=True)
class Request:
    """A promotion that somebody asked for."""

    name: str
    version: int
    target: Target
    actor: Actor
    workspace: str


@dataclass(frozen=True)
class _Approved:
    """What a promotion will apply, and onto what."""

    request: Request
    policy: Policy
    found: ModelVersion
    original: str
    lock: RegisteredLock
    alpha: float


@dataclass(frozen=True)
class Gate:
    """The gate in front of one registry.

    Attributes:
        policy: Gives the policy in force.
        registry: The registry.
        artifacts: The artifacts behind it.
    """

    policy: Callable[[], Policy]
    registry: Registry
    artifacts: Artifacts

    def promote(self, request: Request) -> None:
        """Lock a version that is about to be promoted, where the policy gates that; otherwise do nothing.

        Raises:
            PromotionRefused: The version may not be promoted; a row in the ledger says so, and the registry
                is as it was.
        """
        policy = self.policy()
        rule = policy.rule_for(request.name)
        if rule is None or not rule.covers(request.target):
            return
        found = self.registry.model_version(request.name, request.version)
        try:
            self._promote(request, policy, rule, found)
        except PromotionRefused as refusal:
            self._record(request, policy, "rejected", refusal)
            raise
        except SafelockError as error:
            unreadable = PromotionRefused("unreadable", error.cause, next_step=error.next_step)
            self._record(request, policy, "rejected", unreadable)
            raise unreadable from error

    def _promote(self, request: Request, policy: Policy, rule: GateRule, found: ModelVersion) -> None:
        known = self.registry.promotion_at(found.location)
        original = self.artifacts.resolve((known and known.original_location) or found.location)
        source = examine(self.artifacts.reader(original))
        if source is None:
            if rule.not_an_llm == "reject":
                raise PromotionRefused(
                    "not_an_llm",
                    f"{request.name!r} version {request.version} is no language model, and the policy lets "
                    "only locked language models through.",
                    next_step="Set 'not_an_llm: allow' in the policy's gate for it.",
                )
            return
        try:
            lock = find_lock(found, source, policy, rule, self.registry, self.artifacts)
        except PromotionRefused as refusal:
            if refusal.reason != "missing_lock" or rule.missing_lock == "reject":
                raise
            self._record(request, policy, "passed", refusal)
            return
        approved = _Approved(request, policy, found, original, lock, rule.alpha.default)
        if known is not None and _is_in_force(known, approved):
            return
        self._lock(approved)

    def _lock(self, approved: _Approved) -> None:
        request, found = approved.request, approved.found
        with TemporaryDirectory(prefix="safelock-") as temporary:
            folder = Path(temporary)
            receipt = self._write(approved, folder)
            location = (
                f"{approved.original.rstrip('/')}-safelock/{receipt.digest.removeprefix('sha256:')[:32]}"
            )
            if len(location) > MAX_LOCATION:
                raise PromotionRefused(
                    "location_too_long",
                    f"The locked model's location would have {len(location)} characters, and MLflow holds "
                    f"{MAX_LOCATION}.",
                    next_step="Log the model under a shorter artifact location.",
                )
            self.artifacts.publish(folder, location)
        if read_overlay(self.artifacts.reader(location)).receipt != receipt:
            raise PromotionRefused(
                "not_written",
                f"The locked model at {location} did not read back as it was written.",
                next_step="Look at the artifact store, then promote again.",
            )
        redirection = Redirection(
            name=request.name,
            version=request.version,
            expected_location=found.location,
            location=location,
            tags=_tags(approved, receipt),
            entry=_promoted(approved, receipt, location),
        )
        if not self.registry.redirect(redirection):
            self._accept_the_faster_one(approved)

    def _write(self, approved: _Approved, folder: Path) -> Receipt:
        request, lock = approved.request, approved.lock
        return write_overlay(
            folder,
            self.artifacts.reader(approved.original),
            approved.original,
            lock.lock,
            LockReference(
                digest=lock.lock.digest,
                base_model=lock.lock.base_model,
                model=lock.model,
                version=lock.version,
            ),
            approved.alpha,
            Promotion(
                model=request.name,
                version=request.version,
                target=str(request.target),
                policy=approved.policy.digest,
                actor=request.actor,
            ),
        )

    def _accept_the_faster_one(self, approved: _Approved) -> None:
        """Somebody redirected the version meanwhile: fine if they did what this promotion wanted."""
        request = approved.request
        now = self.registry.model_version(request.name, request.version)
        known = self.registry.promotion_at(now.location)
        if known is None or not _is_in_force(known, approved):
            raise PromotionRefused(
                "conflict",
                f"{request.name!r} version {request.version} was changed by another request meanwhile.",
                next_step="Look at the version, then promote again.",
            )

    def _record(self, request: Request, policy: Policy, event: str, refusal: PromotionRefused) -> None:
        self.registry.record(
            LedgerEntry(
                event="passed" if event == "passed" else "rejected",
                time=_now(),
                workspace=request.workspace,
                model=request.name,
                version=request.version,
                target=str(request.target),
                actor=request.actor,
                reason=refusal.reason,
                message=str(refusal),
                policy=policy.digest,
                lock=None,
                alpha=None,
                original_location=None,
                location=None,
                receipt=None,
            )
        )
        _logger.info("%s %s/%s: %s (%s)", event, request.name, request.version, refusal, refusal.reason)


def _is_in_force(known: LedgerEntry, approved: _Approved) -> bool:
    """Whether an earlier promotion of this very version applied this very lock at this very strength."""
    return (
        (known.workspace, known.model, known.version)
        == (approved.request.workspace, approved.request.name, approved.request.version)
        and known.lock is not None
        and known.lock.digest == approved.lock.lock.digest
        and known.alpha == approved.alpha
    )


def _promoted(approved: _Approved, receipt: Receipt, location: str) -> LedgerEntry:
    request, lock = approved.request, approved.lock
    return LedgerEntry(
        event="promoted",
        time=_now(),
        workspace=request.workspace,
        model=request.name,
        version=request.version,
        target=str(request.target),
        actor=request.actor,
        reason=None,
        message=None,
        policy=approved.policy.digest,
        lock=LockInForce(
            model=lock.model, version=lock.version, digest=lock.lock.digest, base_model=lock.lock.base_model
        ),
        alpha=approved.alpha,
        original_location=approved.original,
        location=location,
        receipt=receipt.digest,
    )


def _tags(approved: _Approved, receipt: Receipt) -> dict[str, str]:
    """For people who look at the version in the UI; never evidence."""
    lock = approved.lock
    return {
        "safelock.state": "locked",
        "safelock.lock": f"models:/{lock.model}/{lock.version}",
        "safelock.lock_digest": lock.lock.digest,
        "safelock.applied_alpha": f"{approved.alpha:g}",
        "safelock.base": lock.lock.base_model,
        "safelock.receipt": receipt.digest,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
