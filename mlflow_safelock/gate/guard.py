"""What the gate does beside promotions: reads, unlocking, revoked locks, and a policy that changes.

A read is where the gate's promise is kept against whoever got past it: a version that is in a gated stage, or
under a gated alias, is handed out only as the ledger has it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from mlflow_safelock.errors import PromotionRefused, SafelockError
from mlflow_safelock.gate.approval import Request
from mlflow_safelock.gate.asked import was_asked_as_much
from mlflow_safelock.gate.failpoints import reach
from mlflow_safelock.gate.leases import Lease, Work
from mlflow_safelock.gate.ledger import LedgerEntry, now
from mlflow_safelock.gate.permissions import require
from mlflow_safelock.gate.policy import ACCEPTED_TOKENIZERS, GateRule, Policy
from mlflow_safelock.gate.ports import ModelVersion, Redirection, Target
from mlflow_safelock.gate.promotion import NOT_AN_LLM, Gate
from mlflow_safelock.gate.source import examine
from mlflow_safelock.gate.tags import LOCK_TAGS, STATE_TAG, UNLOCKED
from mlflow_safelock.gate.transient import is_transient, unreadable
from mlflow_safelock.provenance import Actor

_logger = logging.getLogger(__name__)

READ = Target("read", "download")
UNLOCK = Target("unlock", "registry")
IN_FORCE = Target("policy", "in-force")
"""What the ledger says a row was for: a download, taking a lock off, another policy."""

_CHANGED = "was let through unlocked, and is not what was let through: its files were changed."
_BEFORE_CONTENTS = (
    "was let through unlocked before what it held was kept on record, so that nobody can tell whether it is "
    "the same."
)

READINGS = 3
"""How often a version and what was decided about it are read until they fit: a promotion may come between."""


@dataclass(frozen=True)
class Fault:
    """Why a version may not be where it is, after its name and number.

    Attributes:
        what: What is wrong, in words that are the same each time that it is.
        detail: What a check or a store said about it, which need not be the same.
        is_of_files: Whether it is in the artifacts, and nothing is wrong with its row.
    """

    what: str
    detail: str = ""
    is_of_files: bool = False

    def __str__(self) -> str:
        return f"{self.what} {self.detail}".strip()


@dataclass(frozen=True)
class Guard:
    """The gate's other side, in front of the same registry.

    Attributes:
        gate: The gate.
    """

    gate: Gate

    def check_read(self, name: str, version: int, workspace: str, actor: Actor) -> str | None:
        """Refuse that a version is downloaded which is in a gated place without having passed the gate.

        The ledger has a refusal once, and not each time that somebody asks: a consumer asks again and again.

        Returns:
            The location that was looked at, which is the one to hand out; ``None`` where the version is in no
            gated place.

        Raises:
            PromotionRefused: It serves something else than its promotion wrote, or was never promoted.
        """
        try:
            return self._check_read(name, version, workspace, actor)
        except PromotionRefused as refusal:
            if refusal.reason != "unreachable":  # which is nothing about the version
                self._record_once(Request(name, version, READ, actor, workspace), refusal)
            raise

    def _record_once(self, request: Request, refusal: PromotionRefused) -> None:
        """Append a refused read to the ledger, unless the last one of this version is about the same.

        What cannot be put on record is refused all the same.
        """
        try:
            before = self.gate.registry.last_refusal(
                request.workspace, request.name, request.version, str(request.target)
            )
            if before is None or not _is_the_same(before, refusal):
                self.gate.reject(request, self.gate.policy(), refusal)
        except Exception:
            _logger.exception(
                "A refused read of %s version %s is not on record", request.name, request.version
            )

    def _check_read(self, name: str, version: int, workspace: str, actor: Actor) -> str | None:
        policy = self.gate.policy()
        if not policy.candidates(name):
            return None
        gated = self._gated_version(policy, name, version, workspace)
        if gated is None:
            return None
        found, rule, decision = gated
        fault = self.fault(found, rule, decision)
        if fault is not None:
            may_pass = decision is None or (decision.event == "passed" and stands(decision, found))
            if may_pass and self._is_no_language_model(found, rule):
                self.gate.let_through(
                    Request(name, version, READ, actor, workspace), policy, found, NOT_AN_LLM
                )
                return found.location
            _warn_or_refuse(
                rule.reads,
                PromotionRefused(
                    "not_locked",
                    f"{name!r} version {version} {fault}",
                    next_step="Promote it again, which locks it, or take it out of there.",
                    about=f"{name!r} version {version} {fault.what}",
                ),
            )
        if decision is not None and stands(decision, found):
            self._look_at_the_lock(decision, rule, found)
        return found.location

    def _gated_version(
        self, policy: Policy, name: str, version: int, workspace: str
    ) -> tuple[ModelVersion, GateRule, LedgerEntry | None] | None:
        """A version, its gate and what was decided about it last; ``None`` where it is in no gated place.

        They are two readings. Where they do not fit, a promotion may have come between, so both are read once
        more.
        """
        readings = 0
        while True:
            readings += 1
            found = self.gate.registry.model_version(name, version)
            rule = policy.rule_for(name, found.tags, found.model_tags)
            if rule is None or not rule.gated_places(found):
                return None
            decision = self.gate.registry.decision_on(workspace, name, version)
            if decision is None or stands(decision, found) or readings == READINGS:
                return found, rule, decision

    def fault(self, found: ModelVersion, rule: GateRule, decision: LedgerEntry | None) -> Fault | None:
        """Why a version may not be where it is, as ``fault_of``; what it serves is compared too.

        Of large files blocks are compared, or sizes alone where a store gives whole files only; the loader of
        an overlay compares blocks of the fine-tune's weights.

        Raises:
            PromotionRefused: The store does not answer now.
        """
        by_its_row = fault_of(found, rule, decision)
        if by_its_row is not None:
            return Fault(by_its_row)
        if decision is None or not rule.gated_places(found):
            return None
        try:
            if decision.locks:
                self.gate.locked_models.check_as_decided(decision)
            elif not self.gate.is_let_through(decision, found):
                return Fault(_BEFORE_CONTENTS if decision.contents is None else _CHANGED, is_of_files=True)
        except SafelockError as error:
            if is_transient(error):
                raise unreadable(error) from error
            what = f"does not serve what passed the gate at {found.location}:"
            return Fault(what, error.cause, is_of_files=True)
        return None

    def unlock(self, name: str, version: int, workspace: str, actor: Actor, reason: str) -> str:
        """Let a version serve its fine-tune again, unlocked.

        Returns:
            Where that is.

        Raises:
            PromotionRefused: The policy forbids it, the version is not locked, or it is in a gated place; a
                row in the ledger says so.
        """
        try:
            # The second one is for a promotion to see, which had the first before: it has locked the version
            # and not yet brought it to its place.
            with (
                self.gate.registry.lease(Work(workspace, name, version)) as lease,
                self.gate.registry.lease(Work(workspace, name, version, "unlock")) as sign,
            ):
                return self._unlock(name, version, workspace, actor, reason, lease, sign)
        except PromotionRefused as refusal:
            request = Request(name, version, UNLOCK, actor, workspace)
            self.gate.reject(request, self.gate.policy(), refusal)
            raise

    def _unlock(
        self, name: str, version: int, workspace: str, actor: Actor, reason: str, lease: Lease, sign: Lease
    ) -> str:
        policy = self.gate.policy()
        found = self.gate.registry.model_version(name, version)
        known = self.gate.registry.promotion_at(found.location)
        who = f"{name!r} version {version}"
        require(policy.unlock, actor, "unlock_denied", "take a lock off", "unlock")
        if known is None or known.original_location is None:
            raise PromotionRefused(
                "not_locked", f"{who} is not locked.", next_step="There is nothing to unlock."
            )
        places = policy.gated_places(found)
        if places:
            raise PromotionRefused(
                "still_gated",
                f"{who} is in {' and '.join(str(place) for place in places)}, where only locked models are.",
                next_step="Take it out of the stage, or the alias off it, first.",
            )
        reach("unlock-approved")
        entry = known.model_copy(
            update={
                "event": "unlocked",
                "time": now(),
                "workspace": workspace,
                "model": name,
                "version": version,
                "target": str(UNLOCK),
                "actor": actor,
                "reason": "unlocked",
                "message": reason,
                "policy": policy.digest,
                "location": None,
            }
        )
        done = self.gate.registry.redirect(
            Redirection(
                name=name,
                version=version,
                expected_location=found.location,
                location=known.original_location,
                tags={STATE_TAG: UNLOCKED},
                removed_tags=LOCK_TAGS,
                entries=(entry,),
                lease=lease,
                sign=sign,
            )
        )
        if not done:
            raise PromotionRefused(
                "conflict",
                f"{who} was changed by another request meanwhile.",
                next_step="Look at the version, then unlock it again.",
            )
        return known.original_location

    def _look_at_the_lock(self, decision: LedgerEntry, rule: GateRule, found: ModelVersion) -> None:
        lock = decision.lock
        revoked = self.gate.registry.revocation_of(lock.digest) if lock is not None else None
        if lock is not None and revoked is not None:
            _warn_or_refuse(
                rule.lock.revoked,
                PromotionRefused(
                    "lock_revoked",
                    f"{found.name!r} version {found.version} runs lock {lock.model} version {lock.version}, "
                    f"which was revoked at {revoked.time}: {revoked.message}",
                    next_step="Register another lock for its base, and promote it again.",
                ),
            )

    def _is_no_language_model(self, found: ModelVersion, rule: GateRule) -> bool:
        if rule.not_an_llm == "reject":
            return False
        reader = self.gate.artifacts.reader(self.gate.artifacts.resolve(found.location))
        try:
            return examine(reader) is None
        except SafelockError as error:
            if is_transient(error):
                raise unreadable(error) from error  # what it is will be told once its store answers
            return False  # a language model that cannot be locked, or nothing that can be read


def policy_entry(policy: Policy, actor: Actor, workspace: str) -> LedgerEntry:
    """The ledger's row for a policy that comes into force."""
    return Request("*", 0, IN_FORCE, actor, workspace).row("policy", policy)


def stands(decision: LedgerEntry, found: ModelVersion) -> bool:
    """Whether a version serves what was decided about it last."""
    if decision.locks:
        return decision.location == found.location
    return decision.event == "passed" and decision.original_location == found.location


def fault_of(found: ModelVersion, rule: GateRule, decision: LedgerEntry | None) -> str | None:
    """Why a version may not be where it is, after its name and number; ``None`` where it may.

    Args:
        found: The version as the registry has it.
        rule: The gate that decides over it.
        decision: What was decided about it last.
    """
    places = rule.gated_places(found)
    if not places:
        return None
    if decision is None or not stands(decision, found):
        where = " and ".join(str(place) for place in places)
        difference = _difference(decision, found)
        return f"is in {where}, and what it serves did not pass the gate: {difference}"
    if not decision.locks and not meets(rule, decision):
        return "was let through unlocked, and the policy of now lets no such version through."
    if rule.tags and not meets(rule, decision):
        tags = ", ".join(f"{key}: {glob}" for key, glob in rule.tags.items())
        return (
            f"was promoted before it had its tags, and the gate for those ({tags}) asks for more than it was "
            "promoted with."
        )
    return None


def meets(rule: GateRule, decision: LedgerEntry) -> bool:
    """Whether a version that was promoted through another gate would have passed this one.

    As far as the ledger tells: a version got its tags after its promotion, or another name.
    """
    if decision.lock is None or decision.alpha is None:
        if decision.reason == "missing_lock":
            return rule.missing_lock == "allow"
        return rule.not_an_llm == "allow"
    unknown = decision.kinship is None and rule.kinship.unknown == "allow"
    return (
        (decision.first_version or decision.lock.version) >= rule.lock.min_version
        and decision.alpha >= rule.alpha.min
        and (unknown or (decision.kinship or 0.0) >= rule.kinship.min_cosine)
        and decision.tokenizer in ACCEPTED_TOKENIZERS[rule.tokenizer]
        and (rule.fingerprint == "sampled" or decision.fingerprint is not None)
        and was_asked_as_much(rule, decision)
    )


def _difference(decision: LedgerEntry | None, found: ModelVersion) -> str:
    if decision is None:
        return "the ledger knows no promotion of it."
    if decision.event == "unlocked":
        return "its lock was taken off."
    recorded = decision.location or decision.original_location
    return f"the ledger has it at {recorded}, and it is at {found.location}."


def _is_the_same(before: LedgerEntry, refusal: PromotionRefused) -> bool:
    """Whether a row of the ledger has a refusal of the same, in whatever words the rest of it is."""
    return before.reason == refusal.reason and (before.message or "").startswith(refusal.about)


def _warn_or_refuse(how: str, refusal: PromotionRefused) -> None:
    if how == "refuse":
        raise refusal
    _logger.warning("%s [%s]", refusal, refusal.reason)
