"""The decision: one promotion from the request to a locked version, or to a refusal that changes nothing.

Order of steps: policy; source (never a locked one); base and lock; the locked model, which is an overlay that
is written beside the source and read back, or a standalone model that was prepared there; one database
transaction for the redirection, the tags and the ledger row. Stock MLflow performs the transition afterwards.
A crash between any two steps leaves the version not promoted, or locked and not promoted, and doing it again
finishes it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Literal

import rfc8785

from mlflow_safelock.apply.checkpoint.progress import Progress, silent
from mlflow_safelock.errors import PromotionRefused, SafelockError, VerificationError
from mlflow_safelock.flavors.overlay import read_overlay, write_overlay
from mlflow_safelock.flavors.standalone import Standalone, is_complete, read_standalone, write_standalone
from mlflow_safelock.gate.ledger import LedgerEntry, LockInForce
from mlflow_safelock.gate.locks import RegisteredLock, find_lock
from mlflow_safelock.gate.policy import GateRule, Policy
from mlflow_safelock.gate.ports import Artifacts, ModelVersion, Redirection, Registry, Target
from mlflow_safelock.gate.source import examine
from mlflow_safelock.gate.strength import alpha_for
from mlflow_safelock.provenance import Actor, LockReference, Promotion, Receipt, check_fingerprint

_logger = logging.getLogger(__name__)

NOT_AN_LLM = PromotionRefused("not_an_llm", "It is no language model.")
"""Why most versions go through a gate unlocked."""

STANDALONE = "standalone-"
"""Beginning of the last part of a standalone model's location."""

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
class Preparation:
    """What was made ready for a promotion.

    Attributes:
        carrier: How the policy has the lock carried.
        location: Where the locked model is; ``None`` for an overlay, which the promotion itself writes.
        lock: The lock in it, ``models:/name/version``.
        alpha: Its strength.
        written: What was written; ``None`` where it was there already, or nothing was to be written.
    """

    carrier: str
    location: str | None
    lock: str
    alpha: float
    written: Standalone | None = None


@dataclass(frozen=True)
class _Approved:
    """What a promotion will apply, and onto what."""

    request: Request
    policy: Policy
    rule: GateRule
    found: ModelVersion
    original: str
    lock: RegisteredLock
    kinship: float | None
    alpha: float

    @property
    def uri(self) -> str:
        """The version's address in the registry."""
        return f"models:/{self.request.name}/{self.request.version}"

    @property
    def lock_reference(self) -> LockReference:
        """The lock, for receipts."""
        return LockReference(
            digest=self.lock.lock.digest,
            base_model=self.lock.lock.base_model,
            model=self.lock.model,
            version=self.lock.version,
        )

    @property
    def promotion(self) -> Promotion:
        """The decision, for receipts."""
        return Promotion(
            model=self.request.name,
            version=self.request.version,
            target=str(self.request.target),
            policy=self.policy.digest,
            actor=self.request.actor,
            kinship=None if self.kinship is None else round(self.kinship, 6),
        )

    @property
    def standalone_location(self) -> str:
        """Where the standalone model is: the same for the same source, lock and strength."""
        made_of = rfc8785.dumps([self.original, self.lock.lock.digest, self.alpha])
        return f"{self.original.rstrip('/')}-safelock/{STANDALONE}{hashlib.sha256(made_of).hexdigest()[:32]}"


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
            self.record(request, policy, "rejected", refusal)
            raise
        except SafelockError as error:
            unreadable = PromotionRefused("unreadable", error.cause, next_step=error.next_step)
            self.record(request, policy, "rejected", unreadable)
            raise unreadable from error
        except Exception as error:
            _logger.exception("Promoting %s version %s failed", request.name, request.version)
            failed = PromotionRefused(
                "failed", f"{error} Nothing was promoted.", next_step="The server's log has the details."
            )
            self.record(request, policy, "rejected", failed)
            raise failed from error

    def prepare(self, request: Request, progress: Progress = silent) -> Preparation:
        """Write what a promotion needs and must not take the time for; doing it again changes nothing.

        Args:
            request: What is prepared, and for whom.
            progress: Is told how many bytes were moved, and of how many.

        Raises:
            PromotionRefused: The version could not be promoted as it is; nothing was written.
        """
        policy = self.policy()
        rule = policy.rule_for(request.name)
        if rule is None:
            raise PromotionRefused(
                "not_gated",
                f"No gate of the policy is for {request.name!r}, so its promotions lock nothing.",
                next_step="Promote it, or add a gate for it to the policy.",
            )
        found = self.registry.model_version(request.name, request.version)
        try:
            return self._prepare(request, policy, rule, found, progress)
        except PromotionRefused:
            raise
        except SafelockError as error:
            raise PromotionRefused("unreadable", error.cause, next_step=error.next_step) from error

    def _prepare(
        self, request: Request, policy: Policy, rule: GateRule, found: ModelVersion, progress: Progress
    ) -> Preparation:
        approved = self._approve(request, policy, rule, found)
        if approved is None:
            raise PromotionRefused(
                "nothing_to_lock",
                f"{request.name!r} version {request.version} passes the gate as it is.",
                next_step="Promote it: there is nothing to prepare.",
            )
        lock = f"models:/{approved.lock.model}/{approved.lock.version}"
        if rule.carrier == "overlay":
            return Preparation("overlay", None, lock, approved.alpha)
        location = _short_enough(approved.standalone_location)
        written = None
        if self._prepared(approved) is None:
            written = self.artifacts.derive(
                approved.original,
                location,
                approved.lock.lock,
                lambda source, folder, complete: write_standalone(
                    folder,
                    source,
                    self.artifacts.reader(approved.original),
                    approved.original,
                    approved.lock.lock,
                    approved.lock_reference,
                    approved.alpha,
                    approved.promotion,
                    complete=complete,
                    progress=progress,
                ),
                progress,
            )
            read_standalone(self.artifacts.reader(location))
        return Preparation("standalone", location, lock, approved.alpha, written)

    def _promote(self, request: Request, policy: Policy, rule: GateRule, found: ModelVersion) -> None:
        try:
            approved = self._approve(request, policy, rule, found)
        except PromotionRefused as refusal:
            if refusal.reason != "missing_lock" or rule.missing_lock == "reject":
                raise
            self._let_through(request, policy, found, refusal)
            return
        if approved is None:
            self._let_through(request, policy, found, NOT_AN_LLM)
            return
        known = self.registry.decision_on(request.workspace, request.name, request.version)
        if known is not None and _is_in_force(known, approved, found) and self._still_stands(known):
            return
        if rule.carrier == "overlay":
            location, receipt = self._write_overlay(approved)
        else:
            location, receipt = approved.standalone_location, self._found_prepared(approved)
        redirection = Redirection(
            name=request.name,
            version=request.version,
            expected_location=found.location,
            location=location,
            tags=_tags(approved, receipt),
            entry=_promoted(approved, receipt, location),
        )
        if not self.registry.redirect(redirection):
            # What was written stays for the sweep: a twin that was written in the same millisecond from the
            # same bytes has the same place, and may be in force.
            self._accept_the_faster_one(approved)

    def _let_through(
        self, request: Request, policy: Policy, found: ModelVersion, why: PromotionRefused
    ) -> None:
        """Put on record, once, that a version goes unlocked to where it is going."""
        known = self.registry.decision_on(request.workspace, request.name, request.version)
        if known is None or (known.event, known.original_location) != ("passed", found.location):
            self.record(request, policy, "passed", why, found.location)

    def _still_stands(self, known: LedgerEntry) -> bool:
        """Whether the locked model of an earlier promotion is there as it was written.

        Raises:
            PromotionRefused: The fine-tune that it was made of is not what it was.
        """
        try:
            reader = self.artifacts.reader(known.location or "")
            standalone = _is_standalone(known.location)
            receipt = read_standalone(reader) if standalone else read_overlay(reader).receipt
        except SafelockError as error:
            _logger.warning("The locked model at %s is written again: %s", known.location, error)
            return False
        if receipt.digest != known.receipt:
            _logger.warning(
                "The locked model at %s has another receipt, and is written again", known.location
            )
            return False
        source = receipt.predicate.source
        try:
            check_fingerprint(source.fingerprint, self.artifacts.reader(source.uri))
        except VerificationError as error:
            raise PromotionRefused("source_changed", error.cause, next_step=error.next_step) from error
        return True

    def _approve(
        self, request: Request, policy: Policy, rule: GateRule, found: ModelVersion
    ) -> _Approved | None:
        """What is to be applied to a version; ``None`` where nothing is."""
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
            return None
        chosen = find_lock(found, source, policy, rule, self.registry, self.artifacts)
        lock, kinship = chosen.registered, chosen.kinship
        return _Approved(request, policy, rule, found, original, lock, kinship, alpha_for(found, rule))

    def _write_overlay(self, approved: _Approved) -> tuple[str, Receipt]:
        with TemporaryDirectory(prefix="safelock-") as temporary:
            folder = Path(temporary)
            receipt = write_overlay(
                folder,
                self.artifacts.reader(approved.original),
                approved.original,
                approved.lock.lock,
                approved.lock_reference,
                approved.alpha,
                approved.promotion,
            )
            name = receipt.digest.removeprefix("sha256:")[:32]
            location = _short_enough(f"{approved.original.rstrip('/')}-safelock/{name}")
            self.artifacts.publish(folder, location)
        if read_overlay(self.artifacts.reader(location)).receipt != receipt:
            raise PromotionRefused(
                "not_written",
                f"The locked model at {location} did not read back as it was written.",
                next_step="Look at the artifact store, then promote again.",
            )
        return location, receipt

    def _found_prepared(self, approved: _Approved) -> Receipt:
        receipt = self._prepared(approved)
        if receipt is None:
            raise PromotionRefused(
                "not_prepared",
                f"The policy has {approved.request.name!r} promoted as a standalone model, and none is there "
                f"for version {approved.request.version} with lock {approved.lock.model} version "
                f"{approved.lock.version} at alpha {approved.alpha:g}.",
                next_step=f"Write it, where the registry's database and artifacts can be reached: safelock "
                f"prepare {approved.uri}. Then promote again.",
            )
        return receipt

    def _prepared(self, approved: _Approved) -> Receipt | None:
        """The receipt of the standalone model for a promotion, checked; ``None`` where there is none."""
        reader = self.artifacts.reader(approved.standalone_location)
        if not is_complete(reader):
            return None
        receipt = read_standalone(reader)
        stated = receipt.predicate
        wanted = (approved.original, approved.lock.lock.digest, approved.alpha)
        if (stated.source.uri, stated.lock.digest, stated.alpha) != wanted:
            raise VerificationError(
                f"The locked model at {reader.location} is not of the source, lock and alpha that its place "
                "stands for.",
                next_step="Delete it, and write it again: safelock prepare.",
            )
        check_fingerprint(stated.source.fingerprint, self.artifacts.reader(approved.original))
        return receipt

    def _accept_the_faster_one(self, approved: _Approved) -> None:
        """Somebody redirected the version meanwhile: fine if they did what this promotion wanted."""
        request = approved.request
        now = self.registry.model_version(request.name, request.version)
        known = self.registry.decision_on(request.workspace, request.name, request.version)
        if known is None or not _is_in_force(known, approved, now):
            raise PromotionRefused(
                "conflict",
                f"{request.name!r} version {request.version} was changed by another request meanwhile.",
                next_step="Look at the version, then promote again.",
            )

    def record(
        self,
        request: Request,
        policy: Policy,
        event: Literal["passed", "rejected"],
        refusal: PromotionRefused,
        location: str | None = None,
    ) -> None:
        """Append to the ledger that a version was refused or let through, and why."""
        self.registry.record(
            LedgerEntry(
                event=event,
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
                original_location=location,
                location=None,
                receipt=None,
            )
        )
        _logger.info("%s %s/%s: %s (%s)", event, request.name, request.version, refusal, refusal.reason)


def _is_in_force(known: LedgerEntry, approved: _Approved, found: ModelVersion) -> bool:
    """Whether what was decided last about this version is this very lock at this very strength."""
    return (
        known.locks
        and known.location == found.location
        and known.lock is not None
        and known.lock.digest == approved.lock.lock.digest
        and known.alpha == approved.alpha
        and _is_standalone(known.location) == (approved.rule.carrier == "standalone")
    )


def _is_standalone(location: str | None) -> bool:
    return PurePosixPath(location or "").name.startswith(STANDALONE)


def _short_enough(location: str) -> str:
    if len(location) > MAX_LOCATION:
        raise PromotionRefused(
            "location_too_long",
            f"The locked model's location would have {len(location)} characters, and MLflow holds "
            f"{MAX_LOCATION}.",
            next_step="Log the model under a shorter artifact location.",
        )
    return location


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
        kinship=approved.promotion.kinship,
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
        "safelock.kinship": "unknown" if approved.kinship is None else f"{approved.kinship:.4f}",
        "safelock.receipt": receipt.digest,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
