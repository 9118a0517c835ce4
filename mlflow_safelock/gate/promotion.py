"""The decision: one promotion from the request to a locked version, or to a refusal that changes nothing.

Order of steps: policy; lease, which only keeps others from doing the same work beside this; source (never
a locked one); base and lock; the locked model, which is an overlay that is written beside the source and
read back, or a standalone model that was prepared there; one database transaction for the redirection, the
tags and the ledger row. Stock MLflow performs the transition afterwards. A crash between any two steps leaves
the version not promoted, or locked and not promoted, and doing it again finishes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from mlflow_safelock.apply.checkpoint.progress import Progress, silent
from mlflow_safelock.errors import PromotionRefused, SafelockError, VerificationError
from mlflow_safelock.flavors.standalone import Standalone
from mlflow_safelock.gate.approval import (
    Approved,
    Request,
    approve,
    changed_meanwhile,
    is_prompt,
    original_of,
)
from mlflow_safelock.gate.evaluations import file_evaluation, require_evaluations
from mlflow_safelock.gate.evidence import check_applies, signatories_of, signed_by_rule
from mlflow_safelock.gate.failpoints import reach
from mlflow_safelock.gate.leases import Lease, Work, renewing
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.locked_models import LockedModels
from mlflow_safelock.gate.measurements import Measured, Measurements
from mlflow_safelock.gate.policy import GateRule, Policy
from mlflow_safelock.gate.ports import Artifacts, ModelVersion, Redirection, Registry, Target
from mlflow_safelock.gate.promotion_rows import (
    first_seen,
    is_in_force,
    promoted_entry,
    repaired,
    tags_of,
)
from mlflow_safelock.gate.remembered import holds
from mlflow_safelock.gate.source import examine, hub_reference
from mlflow_safelock.gate.transient import AGAIN, is_transient, unreadable
from mlflow_safelock.provenance import (
    EvaluationStatement,
    MeasuredForm,
    Receipt,
    Signatory,
    SteadyArtifacts,
    check_fingerprint,
    contents_of,
)

_logger = logging.getLogger(__name__)

SNAPSHOT = Target("prepare", "snapshot")
"""What the ledger says a row was for by which weights were fetched from a hub."""

NOT_AN_LLM = PromotionRefused("not_an_llm", "It is no language model.")
"""Why most versions go through a gate unlocked."""


@dataclass(frozen=True)
class Preparation:
    """What was made ready for a promotion.

    Attributes:
        carrier: How the policy has the lock carried.
        location: Where the locked model is; ``None`` for an overlay, which the promotion itself writes.
        lock: The lock in it, ``models:/name/version``.
        alpha: Its strength.
        written: What was written; ``None`` where it was there already, or nothing was to be written.
        measured: The fine-tune's full fingerprint; ``None`` where the policy asks for none.
        fetched: The model on a hub whose weights were written into the fine-tune's folder, in words; ``None``
            where that was not needed.
    """

    carrier: str
    location: str | None
    lock: str
    alpha: float
    written: Standalone | None = None
    measured: Measured | None = None
    fetched: str | None = None


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

    @property
    def locked_models(self) -> LockedModels:
        """The locked models beside the fine-tunes."""
        return LockedModels(self.registry, self.artifacts)

    @property
    def measurements(self) -> Measurements:
        """The full fingerprints beside the fine-tunes."""
        return Measurements(self.registry, self.artifacts)

    def promote(self, request: Request) -> bool:
        """Lock a version that is about to be promoted, where the policy gates that; otherwise do nothing.

        Returns:
            Whether the policy gates that.

        Raises:
            PromotionRefused: The version may not be promoted; a row in the ledger says so, and the registry
                is as it was.
        """
        if not any(rule.covers(request.target) for rule in self.policy().candidates(request.name)):
            return False
        reach("policy-read")
        with ExitStack() as until_done:
            try:
                work = Work(request.workspace, request.name, request.version)
                lease = until_done.enter_context(self.registry.lease(work))
            except PromotionRefused as busy:
                self.reject(request, self.policy(), busy)
                raise
            reach("lease-taken")
            # Looked at under the lease: whoever had it before may have done what is asked for here, and
            # another policy may have come in that time.
            policy = self.policy()
            found = self.registry.model_version(request.name, request.version)
            rule = policy.rule_for(found.name, found.tags, found.model_tags)
            if rule is None or not rule.covers(request.target):
                return False
            self._decide(request, policy, rule, found, lease)
            return True

    def keep_locked(self, request: Request) -> None:
        """Lock a version again whose lock was taken off between ``promote`` and MLflow's own promotion.

        Until that it was in no gated place, so that anybody could; from now on nobody can.

        Raises:
            PromotionRefused: It may not be locked again; a row in the ledger says so.
        """
        if self.registry.is_unlocked(request.workspace, request.name, request.version):
            self.promote(request)

    def _decide(
        self, request: Request, policy: Policy, rule: GateRule, found: ModelVersion, lease: Lease
    ) -> None:
        """Promote; whatever goes wrong becomes a refusal with a row in the ledger."""
        try:
            self._promote(request, policy, rule, found, lease)
        except PromotionRefused as refusal:
            self.reject(request, policy, refusal)
            raise
        except SafelockError as error:
            failure = unreadable(error)
            self.reject(request, policy, failure)
            raise failure from error
        except Exception as error:
            _logger.exception("Promoting %s version %s failed", request.name, request.version)
            reason, again = ("unreachable", f"{AGAIN} ") if is_transient(error) else ("failed", "")
            failed = PromotionRefused(
                reason,
                f"{error} Nothing was promoted.",
                next_step=f"{again}The server's log has the details.",
            )
            self.reject(request, policy, failed)
            raise failed from error

    def prepare(
        self, request: Request, progress: Progress = silent, *, measure_anew: bool = False
    ) -> Preparation:
        """Write what a promotion needs and must not take the time for; doing it again changes nothing.

        Args:
            request: What is prepared, and for whom.
            progress: Is told how many bytes were moved, and of how many.
            measure_anew: Whether a full fingerprint is made also where the one on record seems to hold.

        Raises:
            PromotionRefused: The version could not be promoted as it is; nothing was written but weights of a
                hub's model, where the policy has them fetched.
        """
        policy = self.policy()
        found = self.registry.model_version(request.name, request.version)
        rule = _rule_for(found, policy)
        work = Work(request.workspace, request.name, request.version, "prepare")
        try:
            with self.registry.lease(work) as lease:
                moved = renewing(lease, progress)
                return self._prepare(request, policy, rule, found, moved, measure_anew=measure_anew)
        except PromotionRefused:
            raise
        except SafelockError as error:
            raise unreadable(error) from error

    def file_evaluation(
        self, request: Request, statement: EvaluationStatement, envelope: bytes | None = None
    ) -> LedgerEntry:
        """Put on record how a version was measured, for its promotions; see ``gate.evaluations``.

        Args:
            request: The version, and who files it.
            statement: What was measured.
            envelope: Its signature file; ``None``: it is not signed.

        Raises:
            PromotionRefused: It would never count, or the version could not be promoted as it is.
        """
        approved = self._approved(request)
        try:
            return file_evaluation(statement, envelope, approved, self.registry, self.artifacts)
        except PromotionRefused:
            raise
        except SafelockError as error:
            raise unreadable(error) from error

    def signatories(self, name: str, version: int) -> tuple[Signatory, ...]:
        """Those whose evaluations of a version count, whoever files them.

        Raises:
            PromotionRefused: The policy asks for no signatures, so none do.
        """
        found = self.registry.model_version(name, version)
        return signatories_of(_rule_for(found, self.policy()).evaluation)

    def signed_evaluation(self, name: str, version: int, envelope: bytes) -> EvaluationStatement:
        """What somebody who need not be believed wants filed: signed by somebody whom the policy names.

        Raises:
            PromotionRefused: It is not, or the policy asks for no signatures.
        """
        found = self.registry.model_version(name, version)
        try:
            return signed_by_rule(_rule_for(found, self.policy()).evaluation, envelope)
        except PromotionRefused:
            raise
        except SafelockError as error:
            raise unreadable(error) from error

    def check_measured(self, request: Request, lock: str, alpha: float, form: MeasuredForm) -> None:
        """Refuse before anything is measured that would never count.

        Raises:
            PromotionRefused: A promotion would apply another lock than the one with this digest, or another
                strength, the policy asks for another suite or form, or the version could not be promoted as
                it is.
        """
        check_applies(self._approved(request), lock, alpha, form)

    def _approved(self, request: Request) -> Approved:
        """What a promotion of a version would apply, to whatever place."""
        policy = self.policy()
        found = self.registry.model_version(request.name, request.version)
        rule = _rule_for(found, policy)
        try:
            approved = approve(request, policy, rule, found, self.registry, self.artifacts)
        except PromotionRefused:
            raise
        except SafelockError as error:
            raise unreadable(error) from error
        if approved is None:
            raise _nothing_to_lock(request)
        return approved

    def _prepare(
        self,
        request: Request,
        policy: Policy,
        rule: GateRule,
        found: ModelVersion,
        progress: Progress,
        *,
        measure_anew: bool,
    ) -> Preparation:
        fetched = self._fetch_weights(request, policy, rule, found)
        approved = approve(request, policy, rule, found, self.registry, self.artifacts)
        if approved is None:
            raise _nothing_to_lock(request)
        lock = f"models:/{approved.lock.model}/{approved.lock.version}"
        reach("prepare-approved")
        measured = None
        if rule.fingerprint == "full":
            measure = self.measurements.make_anew if measure_anew else self.measurements.make
            measured = measure(approved, progress)
            approved = replace(approved, measured=measured.fingerprint)
        if rule.carrier == "overlay":
            return Preparation("overlay", None, lock, approved.alpha, None, measured, fetched)
        location, written = self.locked_models.prepare_standalone(approved, progress)
        return Preparation("standalone", location, lock, approved.alpha, written, measured, fetched)

    def _fetch_weights(
        self, request: Request, policy: Policy, rule: GateRule, found: ModelVersion
    ) -> str | None:
        """Fetch the weights of a model that was logged without any, where the policy says so; say which.

        Raises:
            SourceError: They cannot be fetched or written.
        """
        if rule.no_weights == "reject" or is_prompt(found):
            return None
        original = original_of(found, self.registry, self.artifacts)
        reference = hub_reference(self.artifacts.reader(original))
        if reference is None:
            return None
        self.artifacts.add_weights_from_hub(original, reference)
        fetched = f"The weights of {reference} were fetched."
        row = replace(request, target=SNAPSHOT).row("written", policy, location=original, message=fetched)
        self.registry.record(row)
        return str(reference)

    def weigh(
        self, request: Request, policy: Policy, rule: GateRule, found: ModelVersion
    ) -> Approved | PromotionRefused:
        """What a promotion would apply, or why the version goes unlocked; nothing is written.

        Raises:
            PromotionRefused: The version may not be promoted.
            SourceError: Its artifacts cannot be read.
        """
        try:
            approved = approve(request, policy, rule, found, self.registry, self.artifacts)
        except PromotionRefused as refusal:
            if refusal.reason != "missing_lock" or rule.missing_lock == "reject":
                raise
            why = refusal
        else:
            if approved is not None:
                return approved
            why = NOT_AN_LLM
        if self.registry.promotion_at(found.location) is not None:
            raise _still_locked(request, why)
        return why

    def is_done(self, approved: Approved) -> bool:
        """Whether the version runs this lock at this strength already, from files as they were made."""
        request, found = approved.request, approved.found
        known = self.registry.decision_on(request.workspace, request.name, request.version)
        return (
            known is not None
            and is_in_force(known, approved, found)
            and self.locked_models.still_stands(known, approved.rule)
        )

    def _promote(
        self, request: Request, policy: Policy, rule: GateRule, found: ModelVersion, lease: Lease
    ) -> None:
        weighed = self.weigh(request, policy, rule, found)
        if isinstance(weighed, PromotionRefused):
            self.let_through(request, policy, found, weighed)
            return
        approved = require_evaluations(weighed, self.registry, self.artifacts)
        reach("approved")
        if self.is_done(approved):
            seen = first_seen(approved)
            if seen:  # though nothing is written beside it, this promotion counts as one that applied it
                self.registry.record(*seen)
            return
        approved = self.measurements.required(approved)
        if rule.carrier == "overlay":
            location, receipt = self.locked_models.write_overlay(approved)
        else:
            location, receipt = self.locked_models.found_prepared(approved)
        # What the receipt is about is what was examined, and nothing that was put in its place since.
        self._check_unchanged(approved, receipt)
        promoted = promoted_entry(approved, receipt, location)
        redirection = Redirection(
            name=request.name,
            version=request.version,
            expected_location=found.location,
            location=location,
            tags=tags_of(promoted),
            entries=(*first_seen(approved), promoted, *repaired(request, policy, "locked")),
            lease=lease,
            applies=approved.lock.lock.digest,
        )
        if not self.registry.redirect(redirection):
            # What was written stays for the sweep: a twin that was written in the same millisecond from the
            # same bytes has the same place, and may be in force.
            self._accept_the_faster_one(approved)

    def _check_unchanged(self, approved: Approved, receipt: Receipt) -> None:
        """Refuse what was written over since it was examined.

        A hard link, or a change of owner, looks like it, and as if the time of writing was set back. So what
        is there then is examined again, and has to be what the receipt is about.
        """
        if approved.was_touched:
            again = self.weigh(approved.request, approved.policy, approved.rule, approved.found)
            if not isinstance(again, Approved) or again.lock_reference != approved.lock_reference:
                raise changed_meanwhile(approved.request)
            try:
                check_fingerprint(receipt.predicate.source.fingerprint, again.reader)
            except VerificationError as error:
                raise changed_meanwhile(approved.request) from error
            approved = again
        approved.check_unchanged()

    def let_through(
        self, request: Request, policy: Policy, found: ModelVersion, why: PromotionRefused
    ) -> None:
        """Put on record, once, that a version goes unlocked to where it is going, and what it is.

        Raises:
            PromotionRefused: It was written over meanwhile.
            SourceError: It cannot be read.
        """
        known = self.registry.decision_on(request.workspace, request.name, request.version)
        if known is not None and self.is_let_through(known, found):
            return
        contents = None
        if not is_prompt(found):
            reader = SteadyArtifacts(self.artifacts.reader(self.artifacts.resolve(found.location)))
            # Looked at once more, by the bytes that go on record: what was examined before may have been
            # something else.
            if why is NOT_AN_LLM and examine(reader) is not None:
                raise changed_meanwhile(request)
            contents = contents_of(reader)
        self.registry.record(
            request.row(
                "passed",
                policy,
                reason=why.reason,
                message=str(why),
                original_location=found.location,
                contents=contents,
            ),
            *repaired(request, policy, "let through"),
        )
        _log("passed", request, why)

    def is_let_through(self, known: LedgerEntry, found: ModelVersion) -> bool:
        """Whether it was decided last that a version goes unlocked, and it is what that was decided about.

        Raises:
            SourceError: It cannot be read.
        """
        if (known.event, known.original_location) != ("passed", found.location):
            return False
        if known.contents is None:
            return is_prompt(found)
        contents = known.contents
        reader = self.artifacts.reader(self.artifacts.resolve(found.location))
        return holds(reader, contents.model_dump_json(), lambda: contents.are_in(reader))

    def _accept_the_faster_one(self, approved: Approved) -> None:
        """Somebody redirected the version meanwhile: fine if they did what this promotion wanted."""
        request = approved.request
        now = self.registry.model_version(request.name, request.version)
        known = self.registry.decision_on(request.workspace, request.name, request.version)
        if known is None or not is_in_force(known, approved, now):
            raise changed_meanwhile(request)

    def reject(self, request: Request, policy: Policy, refusal: PromotionRefused) -> None:
        """Append to the ledger that a version was refused, and why."""
        self.registry.record(request.row("rejected", policy, reason=refusal.reason, message=str(refusal)))
        _log("rejected", request, refusal)


def _rule_for(found: ModelVersion, policy: Policy) -> GateRule:
    rule = policy.rule_for(found.name, found.tags, found.model_tags)
    if rule is None:
        raise PromotionRefused(
            "not_gated",
            f"No gate of the policy is for {found.name!r}, so its promotions lock nothing.",
            next_step="Promote it, or add a gate for it to the policy.",
        )
    return rule


def _nothing_to_lock(request: Request) -> PromotionRefused:
    return PromotionRefused(
        "nothing_to_lock",
        f"{request.name!r} version {request.version} passes the gate as it is.",
        next_step="Promote it: there is nothing to prepare.",
    )


def _still_locked(request: Request, why: PromotionRefused) -> PromotionRefused:
    return PromotionRefused(
        "still_locked",
        f"{request.name!r} version {request.version} serves a locked model, and a promotion takes no lock "
        f"off. It would go unlocked: {why.cause}",
        next_step=f"Take its lock off while it is in no gated place (safelock unlock models:/{request.name}/"
        f"{request.version}), then promote it; or register the lock that is to be in force.",
    )


def _log(event: str, request: Request, why: PromotionRefused) -> None:
    _logger.info("%s %s/%s: %s (%s)", event, request.name, request.version, why, why.reason)
