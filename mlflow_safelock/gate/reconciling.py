"""Putting right what came past the gate: how it differs from the ledger, what would be done, and doing it.

What is decided about a version is decided by a promotion, as for any client. Beside it stand what needs no
decision: a row that somebody edited goes back to what the ledger says where the gate would decide so now, a
renaming past the gate is put on record, and what may not stay where it is, is taken out of there. Each repair
has a row ``reconciled`` in the ledger, written in the transaction that makes the repair.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from mlflow_safelock.errors import LedgerError, PromotionRefused, SafelockError
from mlflow_safelock.gate.approval import Request
from mlflow_safelock.gate.explanation import Refusal, explain
from mlflow_safelock.gate.guard import Fault, Guard, fault_of
from mlflow_safelock.gate.leases import Work
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.policy import GateRule, Policy
from mlflow_safelock.gate.ports import ModelVersion, Redirection, Registry, Target, Withdrawal
from mlflow_safelock.gate.promotion import Gate
from mlflow_safelock.gate.promotion_rows import reconciled_entry, tags_of
from mlflow_safelock.gate.renaming import Renaming, decision_under
from mlflow_safelock.provenance import Actor

_logger = logging.getLogger(__name__)

Way = Literal["lock", "demote"]
"""What a repair may do: lock what slipped through, or take it out of its gated places."""

Done = Literal["restored", "renamed", "locked", "let through", "taken out", "gone"]
"""What a repair did, and what its row in the ledger has as its reason.

``restored``: location and tags are what the ledger says, or, where the gate would decide otherwise now and
refuses, it is at its own fine-tune. ``renamed``: what was decided under the model's
former name goes on. ``locked``, ``let through``: the gate decided so. ``taken out``: it is in no gated place.
``gone``: somebody deleted the version meanwhile, so there was nothing left to do, and there is no row.
"""


@dataclass(frozen=True)
class Remedy:
    """What makes a version fit to stay where it is.

    Attributes:
        done: What it comes to; ``None`` where the gate refuses.
        words: What would be done, after "It would be".
        back: The version as the ledger has it, where its row was edited; that comes first.
        former: The name that its model had, where it was renamed past the gate.
        refusal: Why the gate refuses.
    """

    done: Done | None
    words: str
    back: ModelVersion | None = None
    former: str | None = None
    refusal: Refusal | None = None


@dataclass(frozen=True)
class Difference:
    """A version in a gated place that is not as the ledger has it.

    Attributes:
        request: The version, and who asks.
        found: The version as the registry has it.
        places: The gated places that it is in.
        what: What differs, after its name.
        decision: What was decided about it last.
        is_served: Whether the gate would hand it out as it is, so that only its tags differ.
        remedy: What makes it fit to stay.
        is_told: Whether it could be told what it serves; where not, nothing is done about it.
    """

    request: Request
    found: ModelVersion
    places: tuple[Target, ...]
    what: str
    decision: LedgerEntry | None
    is_served: bool
    remedy: Remedy
    is_told: bool = True


@dataclass(frozen=True)
class Repair:
    """What was done about a difference.

    Attributes:
        difference: The difference.
        done: What was done; ``None`` where it was left as it is.
        refusal: Why the gate did not lock it.
    """

    difference: Difference
    done: Done | None
    refusal: Refusal | None = None


@dataclass(frozen=True)
class Reconciling:
    """Finds what differs from the ledger, and puts it right.

    Attributes:
        guard: The guard of the registry, and its gate.
    """

    guard: Guard

    @property
    def gate(self) -> Gate:
        """The gate."""
        return self.guard.gate

    @property
    def registry(self) -> Registry:
        """The registry."""
        return self.gate.registry

    def examine(self, name: str, version: int, workspace: str, actor: Actor) -> Difference | None:
        """How a version differs from what the ledger says; ``None`` where it does not. Nothing is written.

        Raises:
            mlflow.exceptions.MlflowException: There is no such version.
        """
        policy = self.gate.policy()
        found = self.registry.model_version(name, version)
        rule = policy.rule_for(found.name, found.tags, found.model_tags)
        places = rule.gated_places(found) if rule is not None else ()
        if rule is None or not places:
            return None
        request = Request(name, version, places[0], actor, workspace)
        decision: LedgerEntry | None = None
        try:
            decision = self.registry.decision_on(workspace, name, version)
            fault = self.guard.fault(found, rule, decision)
        except LedgerError as error:
            fault = Fault("is held to a row that cannot be read:", error.cause)
        except PromotionRefused as unreachable:
            return _untold(request, found, places, decision, _refusal_of(unreachable))
        if fault is not None and fault.is_of_files and not self._can_be_read(found, decision):
            return _untold(request, found, places, decision, _cannot_be_read(fault))
        back = self._as_the_ledger_has_it(found, decision)
        if fault is None and back is None:
            return None
        what = "has other tags than the gate gave it." if fault is None else str(fault)
        try:
            remedy = self._remedy(request, rule, found, decision, back)
        except Exception as error:
            _logger.exception("What %s version %s needs cannot be told", name, version)
            remedy = _refused("", Refusal("failed", f"{error}", "The log has the details."), back)
        return Difference(request, found, places, what, decision, fault is None, remedy)

    def repair(self, difference: Difference, ways: Collection[Way]) -> Repair:
        """Put a version right.

        Args:
            difference: What was found.
            ways: What may be done. What the gate lets through as it is goes on record in any case.
        """
        remedy, refusal, left = difference.remedy, difference.remedy.refusal, difference
        if not difference.is_told:
            return Repair(difference, None, refusal)
        is_doable = refusal is None or remedy.back is not None
        if is_doable and ("lock" in ways or remedy.done in ("let through", "renamed")):
            try:
                still = self._make_fit(difference)
            except SafelockError as error:
                refusal = _refusal_of(error)
            else:
                if still is None:
                    return Repair(difference, remedy.done or "restored", refusal)
                left, refusal = still, refusal or still.remedy.refusal
        if "demote" in ways and left.is_told and not left.is_served:
            try:
                self._take_out(left, refusal)
                return Repair(difference, "taken out", refusal)
            except SafelockError as error:
                refusal = _refusal_of(error)
        return Repair(difference, None, refusal)

    def _remedy(
        self,
        request: Request,
        rule: GateRule,
        found: ModelVersion,
        decision: LedgerEntry | None,
        back: ModelVersion | None,
    ) -> Remedy:
        former = self._former_name(request, found) if decision is None else None
        if former is not None:
            return Remedy("renamed", f"put on record as renamed from {former!r}", former=former)
        first = ""
        if back is not None and decision is not None:
            first = _going_back(found, back)
            tags_only = back.location == found.location and self.guard.fault(found, rule, decision) is None
            if tags_only or self._would_decide_so(request, rule, back, decision):
                return Remedy("restored", first, back)
            back = self._at_its_source(found, decision)
            first = "" if back is None else f"{_going_back(found, back)}, and then "
        explained = explain(self.gate, request, back or found)
        if explained.refusal is not None:
            return _refused(first, explained.refusal, back)
        if explained.outcome == "pass unlocked":
            return Remedy("let through", f"{first}let through unlocked: {explained.why[-1]}", back)
        return Remedy("locked", f"{first}locked with {explained.lock} at alpha {explained.alpha:g}", back)

    def _would_decide_so(
        self, request: Request, rule: GateRule, back: ModelVersion, decision: LedgerEntry
    ) -> bool:
        """Whether the gate would decide now what it decided, and what it decided about is there as it was.

        A model that was deleted and made anew of the same fine-tune cannot be told from an edited row, so
        nothing is put in force again that a promotion would not apply.
        """
        if fault_of(back, rule, decision) is not None:
            return False
        outcome = explain(self.gate, request, back).outcome
        return outcome == ("nothing to do" if decision.locks else "pass unlocked")

    def _at_its_source(self, found: ModelVersion, decision: LedgerEntry) -> ModelVersion | None:
        """The version at its own fine-tune, to be promoted from there; ``None`` where it is now as well."""
        original = decision.original_location
        if original is None or found.location == decision.location or self._lies_at(found.location, original):
            return None
        return replace(found, location=original)

    def _former_name(self, request: Request, found: ModelVersion) -> str | None:
        """The name under which a version was locked whose model was renamed past the gate."""
        known = self.registry.promotion_at(found.location)
        if known is None or known.model == found.name or known.version != found.version:
            return None
        renaming, workspace = Renaming(self.gate), request.workspace
        before = self.registry.decision_on(workspace, known.model, found.version)
        if before is None or not before.locks:
            return None
        if not renaming.is_half_done(known.model, found.name, workspace):
            return None
        # Under a stricter gate what was decided does not go on: the version is promoted anew, or refused.
        refusal = renaming.refusal(found, before, known.model, found.name, workspace, request.actor)
        return known.model if refusal is None else None

    def _make_fit(self, difference: Difference) -> Difference | None:
        """Make a version fit to stay where it is; what still differs then.

        A row that was edited goes back even where the gate refuses to do more: what is there then is the
        version's own fine-tune, which is handed out to nobody.
        """
        remedy, request, policy = difference.remedy, difference.request, self.gate.policy()
        if remedy.former is not None:
            self._put_on_record(difference, remedy.former, policy)
        if remedy.back is not None:
            self._put_back(difference, remedy.back, policy)
        if remedy.done in ("locked", "let through"):
            self.gate.promote(replace(request, found=_message(difference, f"It was {remedy.done}.")))
        return self.examine(request.name, request.version, request.workspace, request.actor)

    def _put_on_record(self, difference: Difference, former: str, policy: Policy) -> None:
        request = difference.request
        with self.registry.lease(Work(request.workspace, request.name, request.version)):
            decision = self.registry.decision_on(request.workspace, former, request.version)
            if decision is None or self._is_another_by_now(difference):
                raise _changed(request)
            message = _message(difference, f"The registered model was called {former!r}.")
            self.registry.record(
                decision_under(decision, request.name, former, request.actor),
                reconciled_entry(request, policy, "renamed", message),
            )

    def _put_back(self, difference: Difference, back: ModelVersion, policy: Policy) -> None:
        request, found = difference.request, difference.found
        with self.registry.lease(Work(request.workspace, request.name, request.version)) as lease:
            if self._is_another_by_now(difference):
                raise _changed(request)
            message = _message(difference, f"It was {_going_back(found, back)}.")
            done = self.registry.redirect(
                Redirection(
                    name=request.name,
                    version=request.version,
                    expected_location=found.location,
                    location=back.location,
                    tags={key: value for key, value in back.tags.items() if found.tags.get(key) != value},
                    entries=(reconciled_entry(request, policy, "restored", message),),
                    lease=lease,
                    applies=_put_in_force(difference, back),
                )
            )
        if not done:
            raise _changed(request)

    def _take_out(self, difference: Difference, refusal: Refusal | None) -> None:
        """Take a version out of its gated places, unless somebody put it right meanwhile."""
        request, policy, found = difference.request, self.gate.policy(), difference.found
        with self.registry.lease(Work(request.workspace, request.name, request.version)) as lease:
            if self._is_another_by_now(difference):
                raise _changed(request)
            left = " and ".join(map(str, difference.places))
            why = f" The gate refused to lock it [{refusal.reason}]: {refusal.cause}" if refusal else ""
            message = _message(difference, f"It was taken out of {left}.{why}")
            done = self.registry.withdraw(
                Withdrawal(
                    found=found,
                    leaves_stage=any(place.kind == "stage" for place in difference.places),
                    aliases=tuple(place.name for place in difference.places if place.kind == "alias"),
                    entries=(reconciled_entry(request, policy, "taken out", message),),
                    lease=lease,
                )
            )
        if not done:
            raise _changed(request)

    def _as_the_ledger_has_it(self, found: ModelVersion, decision: LedgerEntry | None) -> ModelVersion | None:
        """The version at the place that was decided about, with the gate's tags; ``None``: it is so already.

        A version that was never decided about, or unlocked since, is at any place as the ledger has it. So is
        one of a model that was deleted and made anew: what was decided was about another of that number.
        """
        back = found
        if decision is None or not self._is_about(decision, found):
            return None
        if decision.locks and decision.location is not None:
            back = replace(found, location=decision.location, tags={**found.tags, **tags_of(decision)})
        elif decision.event == "passed" and decision.original_location is not None:
            back = replace(found, location=decision.original_location)
        return None if back == found else back

    def _is_about(self, decision: LedgerEntry, found: ModelVersion) -> bool:
        """Whether a decision is about the artifacts that a version was registered with."""
        if found.location in (decision.location, decision.original_location):
            return True
        original = decision.original_location
        return original is not None and self._lies_at(found.source, original)

    def _lies_at(self, uri: str, location: str) -> bool:
        """Whether a URI leads to a location."""
        artifacts = self.gate.artifacts
        try:
            return artifacts.place(artifacts.resolve(uri)) == artifacts.place(location)
        except Exception as error:  # noqa: BLE001 - each kind of store raises its own
            _logger.warning("%s is not found: %s", uri, error)
            return False

    def _can_be_read(self, found: ModelVersion, decision: LedgerEntry | None) -> bool:
        """Whether this process reads what a version serves, or what that was made of.

        Where it reads neither, they may be gone, or be read by the registry's server alone.
        """
        original = None if decision is None else decision.original_location
        return any(self._reads(place) for place in (found.location, original) if place is not None)

    def _reads(self, location: str) -> bool:
        artifacts = self.gate.artifacts
        try:
            reader = artifacts.reader(artifacts.resolve(location))
            smallest = min(reader.files(), key=lambda file: file.size, default=None)
            if smallest is None:
                return False
            reader.read(smallest.path)
        except Exception as error:  # noqa: BLE001 - each kind of store raises its own
            _logger.warning("What is at %s cannot be read here: %s", location, error)
            return False
        return True

    def _is_another_by_now(self, difference: Difference) -> bool:
        """Whether a version, or what was decided about it, changed since it was examined."""
        request = difference.request
        try:
            decision = self.registry.decision_on(request.workspace, request.name, request.version)
        except LedgerError:
            decision = None  # as it was when it was examined
        found = self.registry.model_version(request.name, request.version)
        return decision != difference.decision or found != difference.found


def _untold(
    request: Request,
    found: ModelVersion,
    places: tuple[Target, ...],
    decision: LedgerEntry | None,
    why: Refusal,
) -> Difference:
    """A version of which nobody can say now whether it serves what passed the gate."""
    what = "cannot be compared with what passed the gate."
    remedy = _refused("", why, None)
    return Difference(request, found, places, what, decision, is_served=False, remedy=remedy, is_told=False)


def _cannot_be_read(fault: Fault) -> Refusal:
    return Refusal(
        "unreadable",
        f"Neither what it serves nor its fine-tune can be read here: {fault.detail or fault.what}",
        "Have them read by this process (--artifacts-destination is for artifacts behind a server); if they "
        "are gone, take it out of there, or register it anew.",
    )


def _going_back(found: ModelVersion, back: ModelVersion) -> str:
    if back.location == found.location:
        return "given its tags back"
    return f"put back to {back.location}, from {found.location}"


def _put_in_force(difference: Difference, back: ModelVersion) -> str | None:
    """Digest of the lock that comes into force again by going back; ``None`` where none does, as by tags."""
    decision, found = difference.decision, difference.found
    if decision is None or back.location == found.location or back.location != decision.location:
        return None
    return decision.lock_digest


def _refused(first: str, refusal: Refusal, back: ModelVersion | None) -> Remedy:
    return Remedy(None, f"{first}refused [{refusal.reason}]: {refusal.cause}", back, refusal=refusal)


def _message(difference: Difference, done: str) -> str:
    return f"It {difference.what} {done}"


def _refusal_of(error: SafelockError) -> Refusal:
    reason = error.reason if isinstance(error, PromotionRefused) else "failed"
    return Refusal(reason, error.cause, error.next_step)


def _changed(request: Request) -> PromotionRefused:
    return PromotionRefused(
        "conflict",
        f"{request.name!r} version {request.version} was changed by another request meanwhile.",
        next_step="Look at the version, then reconcile again.",
    )
