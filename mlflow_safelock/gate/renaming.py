"""Renaming a registered model: nothing unlocked comes into a gated place by it, and decisions go along.

MLflow renames in a transaction of its own, and the ledger's rows come after it. In between a version in a
gated place is handed out to nobody, since its new name has no decision; the same call again writes the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from mlflow_safelock.errors import PromotionRefused
from mlflow_safelock.gate.approval import Request
from mlflow_safelock.gate.failpoints import reach
from mlflow_safelock.gate.guard import meets, stands
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.ports import Target
from mlflow_safelock.gate.promotion import Gate
from mlflow_safelock.provenance import Actor


@dataclass(frozen=True)
class Renaming:
    """The gate in front of renaming.

    Attributes:
        gate: The gate.
    """

    gate: Gate

    def check(self, name: str, new_name: str, workspace: str, actor: Actor) -> None:
        """Refuse a name under which an unlocked version would be in a gated place.

        Raises:
            PromotionRefused: It would; the registered model keeps its name, and a row in the ledger says so.
        """
        policy = self.gate.policy()
        if not policy.candidates(new_name):
            return
        for version in self.gate.registry.model_versions(name):
            rule = policy.rule_for(new_name, version.tags, version.model_tags)
            places = rule.gated_places(version) if rule is not None else ()
            decision = self.gate.registry.decision_on(workspace, name, version.version)
            if rule is None or not places:
                continue
            if decision is None or not stands(decision, version):
                why = "without having passed the gate"
            elif not meets(rule, decision):
                why = "whose gate asks for more than it was promoted with"
            else:
                continue
            refusal = PromotionRefused(
                "not_locked",
                f"Under the name {new_name!r} version {version.version} would be in {places[0]}, {why}.",
                next_step="Take it out of the stage or alias, rename, and promote it again.",
            )
            request = Request(name, version.version, Target("rename", new_name), actor, workspace)
            self.gate.reject(request, policy, refusal)
            raise refusal
        reach("rename-checked")

    def is_half_done(self, name: str, new_name: str, workspace: str) -> bool:
        """Whether a model has a new name that the ledger does not know of, since somebody died between.

        A decision counts only where a version is still at the place that the decision is about, and was
        brought there by it: whoever deletes a model and registers a locked place anew renames nothing.
        """
        if self.gate.registry.model_versions(name):
            return False
        for version in self.gate.registry.model_versions(new_name):
            before = self.gate.registry.decision_on(workspace, name, version.version)
            now = self.gate.registry.decision_on(workspace, new_name, version.version)
            if before is None or not stands(before, version) or (before.locks and version.is_copy):
                continue
            if now is None or not stands(now, version):
                return True
        return False

    def put_on_record(self, name: str, new_name: str, workspace: str, actor: Actor) -> None:
        """Let the ledger's decisions go on under a registered model's new name.

        None does that its gate there would not have made: where somebody tagged or promoted a version since
        ``check``, it is handed out to nobody.
        """
        policy = self.gate.policy()
        for version in self.gate.registry.model_versions(new_name):
            decision = self.gate.registry.decision_on(workspace, name, version.version)
            if decision is None:
                continue
            now = self.gate.registry.decision_on(workspace, new_name, version.version)
            if now is not None and (stands(now, version) or not stands(decision, version)):
                continue  # it was put on record before somebody died, or decided anew since
            rule = policy.rule_for(new_name, version.tags, version.model_tags)
            if rule is not None and rule.gated_places(version) and not meets(rule, decision):
                continue
            self.gate.registry.record(decision_under(decision, new_name, name, actor))
            reach("rename-recorded")


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
