"""What a gate asked of a promotion that nothing else in its row tells: signatures, evaluations, a lock's age.

A version may come under another gate when somebody tags it. Whether it would have passed there is told by its
row: what was found (lock, alpha, kinship, …), and what was asked for beside that. A row that does not say,
such as one from before this was put on record, was asked for none of it.
"""

from __future__ import annotations

import rfc8785
from pydantic import JsonValue, ValidationError

from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.places import is_standalone
from mlflow_safelock.gate.policy import GateRule
from mlflow_safelock.gate.strictness import looser_points

_KEYS = ("lock.max_age_days", "own_biases", "signature", "evaluation")
"""Keys of a gate, and beginnings of their parts', that are put on record as they were asked."""


def asked_of(rule: GateRule) -> dict[str, JsonValue] | None:
    """What a gate asks for, for the row of a promotion through it; ``None``: nothing of the kind."""
    looks_at_biases = rule.own_biases == "check"
    asks_more = rule.lock.max_age_days is not None or rule.signature.required or rule.evaluation is not None
    if looks_at_biases and not asks_more:
        return None
    asked: dict[str, JsonValue] = rule.model_dump(
        mode="json",
        include={"lock": {"max_age_days"}, "signature": True, "evaluation": True},
    )
    # Left out where they were looked at, as in rows of versions of this package that did so or could not.
    return asked if looks_at_biases else {**asked, "own_biases": rule.own_biases}


def own_biases_in(decision: LedgerEntry) -> str:
    """What the gate of a promotion had of the model's own biases: ``check`` or ``ignore``."""
    return str((decision.asked or {}).get("own_biases", "check"))


def was_asked_as_much(rule: GateRule, decision: LedgerEntry) -> bool:
    """Whether a locked version was asked for no less than a gate by tag asks for, and has its carrier.

    Any other gate asks at each promotion and renaming itself, and not of what was promoted before.
    """
    if not rule.tags:
        return True
    if is_standalone(decision.location) != (rule.carrier == "standalone"):
        return False
    return not any(point.startswith(_KEYS) for point in looser_points(_gate_of(decision), rule))


def _gate_of(decision: LedgerEntry) -> GateRule:
    """A gate that asks for what was asked of a promotion, and for the least in all else."""
    try:
        return GateRule.model_validate_json(rfc8785.dumps(decision.asked or {}))
    except ValidationError:
        return GateRule()  # written by another version, whose word is not known here
