"""What a reconciliation found and did, as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow_safelock.gate.reconciling import Repair


def facts_of(repair: Repair) -> dict[str, Any]:
    """A repair, or a difference that nothing was done about, for JSON."""
    difference, refusal = repair.difference, repair.refusal or repair.difference.remedy.refusal
    request = difference.request
    return {
        "workspace": request.workspace,
        "model": request.name,
        "version": request.version,
        "places": [str(place) for place in difference.places],
        "found": f"It {difference.what}",
        "lock": f"It would be {difference.remedy.words}",
        "demote": _demotion(repair),
        "done": repair.done,
        "refusal": refusal
        and {"reason": refusal.reason, "cause": refusal.cause, "next_step": refusal.next_step},
    }


def _demotion(repair: Repair) -> str:
    """What --demote alone would do."""
    difference = repair.difference
    if difference.remedy.done in ("let through", "renamed"):
        return f"It would be {difference.remedy.words}"
    if not difference.is_told:
        return "Nothing, until it can be told what it serves"
    if difference.is_served:
        return "Nothing: it serves what it should"
    return f"It would be taken out of {' and '.join(map(str, difference.places))}"
