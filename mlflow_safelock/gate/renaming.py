"""Renaming a registered model: nothing comes into a gated place by it that its gate there would refuse.

MLflow renames in a transaction of its own, and the ledger's rows come after it. In between a version in a
gated place is handed out to nobody, since its new name has no decision; the same call again writes the rest.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import NoReturn

from mlflow_safelock.errors import PromotionRefused, SafelockError
from mlflow_safelock.gate.approval import Request, approve
from mlflow_safelock.gate.evaluations import require_evaluations
from mlflow_safelock.gate.failpoints import reach
from mlflow_safelock.gate.guard import meets, stands
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.lock_records import LockRecords, is_for_locks
from mlflow_safelock.gate.policy import GateRule, Policy
from mlflow_safelock.gate.ports import ModelVersion, Target
from mlflow_safelock.gate.promotion import Gate
from mlflow_safelock.gate.promotion_rows import suffices
from mlflow_safelock.gate.transient import unreadable
from mlflow_safelock.provenance import Actor

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Renaming:
    """The gate in front of renaming.

    Attributes:
        gate: The gate.
    """

    gate: Gate

    def check(self, name: str, new_name: str, workspace: str, actor: Actor) -> None:
        """Refuse a name under which a version would be in a gated place that its gate would refuse there.

        And one for locks, unless all versions are locks of its base.

        Raises:
            PromotionRefused: The registered model keeps its name, and a row in the ledger says so.
        """
        policy = self.gate.policy()
        if not policy.candidates(new_name) and not is_for_locks(new_name):
            return
        for version in self.gate.registry.model_versions(name):
            refusal = self._locks.refusal_under(new_name, version)
            if refusal is None:
                decision = self.gate.registry.decision_on(workspace, name, version.version)
                refusal = self.refusal(version, decision, name, new_name, workspace, actor)
            if refusal is not None:
                self._reject(refusal, version, name, new_name, workspace, actor)
        reach("rename-checked")

    def check_what_came(self, name: str, new_name: str, workspace: str, actor: Actor) -> None:
        """Refuse a name for locks once more, when the model has it: versions may have come since ``check``.

        More come through the gate alone by then.

        Raises:
            PromotionRefused: One is no lock of the name's base; a row in the ledger says so.
        """
        if is_for_locks(new_name):
            for version in self.gate.registry.model_versions(new_name):
                refusal = self._locks.refusal_under(new_name, version)
                if refusal is not None:
                    self._reject(refusal, version, name, new_name, workspace, actor)

    @property
    def _locks(self) -> LockRecords:
        return LockRecords(self.gate)

    def _reject(
        self,
        refusal: PromotionRefused,
        version: ModelVersion,
        name: str,
        new_name: str,
        workspace: str,
        actor: Actor,
    ) -> NoReturn:
        request = Request(name, version.version, Target("rename", new_name), actor, workspace)
        self.gate.reject(request, self.gate.policy(), refusal)
        raise refusal

    def refusal(
        self,
        version: ModelVersion,
        decision: LedgerEntry | None,
        name: str,
        new_name: str,
        workspace: str,
        actor: Actor,
    ) -> PromotionRefused | None:
        """Why a version may not be where it is under another name; ``None`` where it may.

        Where the same gate decides for both names, and the policy names the same base, what was decided goes
        on. Any other gate decides as it does at a promotion, and what it would apply must be in force.

        Args:
            version: The version, under either name.
            decision: What was decided last about it under its former name.
            name: The former name.
            new_name: The new one.
            workspace: MLflow workspace.
            actor: Who renames.
        """
        policy = self.gate.policy()
        rule = policy.rule_for(new_name, version.tags, version.model_tags)
        places = rule.gated_places(version) if rule is not None else ()
        if rule is None or not places:
            return None
        where = f"Under the name {new_name!r} version {version.version} would be in {places[0]}"
        if decision is None or not stands(decision, version):
            return _refused("not_locked", f"{where}, without having passed the gate.")
        if not meets(rule, decision):
            return _refused("not_locked", f"{where}, {_ASKS_FOR_MORE}.")
        before = policy.rule_for(name, version.tags, version.model_tags)
        if rule == before and policy.base_of(name) == policy.base_of(new_name):
            return None
        request = Request(new_name, version.version, places[0], actor, workspace)
        try:
            if self._passes(request, policy, rule, replace(version, name=new_name), decision):
                return None
        except PromotionRefused as refusal:
            return _refused(refusal.reason, f"{where}, and its gate refuses that: {refusal.cause}")
        except SafelockError as error:
            return unreadable(error)
        return _refused("not_locked", f"{where}, {_ASKS_FOR_MORE}.")

    def _passes(
        self, request: Request, policy: Policy, rule: GateRule, found: ModelVersion, decision: LedgerEntry
    ) -> bool:
        """Whether a gate would have what was decided through another one.

        Raises:
            PromotionRefused: It would not, and says why.
            SourceError: The version's artifacts cannot be read.
        """
        registry, artifacts = self.gate.registry, self.gate.artifacts
        try:
            approved = approve(request, policy, rule, found, registry, artifacts)
        except PromotionRefused as refusal:
            if refusal.reason == "missing_lock" and rule.missing_lock == "allow":
                return True
            raise
        if approved is None:
            return True
        return suffices(decision, require_evaluations(approved, registry, artifacts), found)

    def is_half_done(self, name: str, new_name: str, workspace: str) -> bool:
        """Whether a model has a new name that the ledger does not know of, since somebody died between.

        A decision counts only where a version is still at the place that the decision is about, and was
        brought there by it: whoever deletes a model and registers a locked place anew, or had it copied
        before, renames nothing.
        """
        if self.gate.registry.model_versions(name):
            return False
        for found in self.gate.registry.model_versions(new_name):
            before = self.gate.registry.decision_on(workspace, name, found.version)
            now = self.gate.registry.decision_on(workspace, new_name, found.version)
            if before is None or (now is not None and stands(now, found)):
                continue
            version = self.gate.registry.as_decided(found, before)
            if not stands(before, version):
                continue
            if not before.locks or not version.is_copy or self._was_promoted_itself(version):
                return True
        return False

    def _was_promoted_itself(self, version: ModelVersion) -> bool:
        """Whether a version was there before what it serves locked was: a copy of that came after it."""
        promoted = (
            datetime.fromisoformat(entry.time).timestamp() * 1000
            for entry in self.gate.registry.locking_entries()
            if entry.event == "promoted" and entry.location == version.location
        )
        first = min(promoted, default=0.0)
        return version.created is not None and version.created < first

    def put_on_record(self, name: str, new_name: str, workspace: str, actor: Actor) -> None:
        """Let the ledger's decisions go on under a registered model's new name.

        None does that its gate there would not have made: where somebody tagged or promoted a version since
        ``check``, or renamed past it, it is handed out to nobody.

        Raises:
            PromotionRefused: A store does not answer now, so that this cannot be told.
        """
        for found in self.gate.registry.model_versions(new_name):
            decision = self.gate.registry.decision_on(workspace, name, found.version)
            if decision is None:
                continue
            now = self.gate.registry.decision_on(workspace, new_name, found.version)
            if now is not None and stands(now, found):
                continue  # it was put on record before somebody died
            version = self.gate.registry.as_decided(found, decision)
            if now is not None and not stands(decision, version):
                continue  # it was decided anew since
            refusal = self.refusal(version, decision, name, new_name, workspace, actor)
            if refusal is not None and refusal.reason == "unreachable":
                raise refusal
            if refusal is not None:
                _logger.warning("What was decided about %s is left behind: %s", name, refusal)
                continue
            self.gate.registry.record(decision_under(decision, new_name, name, actor))
            reach("rename-recorded")


_ASKS_FOR_MORE = "whose gate asks for more than it was promoted with"


def _refused(reason: str, cause: str) -> PromotionRefused:
    return PromotionRefused(
        reason, cause, next_step="Take it out of the stage or alias, rename, and promote it again."
    )


def decision_under(decision: LedgerEntry, new_name: str, name: str, actor: Actor) -> LedgerEntry:
    """The row by which a decision goes on under a registered model's new name."""
    return decision.model_copy(
        update={
            "event": "renamed" if decision.locks else decision.event,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "model": new_name,
            "actor": actor,
            "message": f"The registered model was called {name!r}.",
        }
    )
