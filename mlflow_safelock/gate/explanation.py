"""What a promotion would do, found out by the gate's own checks, with nothing promoted or written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mlflow_safelock.errors import PromotionRefused, SafelockError
from mlflow_safelock.gate.approval import Approved, Request, original_of
from mlflow_safelock.gate.evaluations import require_evaluations
from mlflow_safelock.gate.policy import GateRule, Policy
from mlflow_safelock.gate.ports import ModelVersion
from mlflow_safelock.gate.promotion import Gate
from mlflow_safelock.gate.promotion_rows import promoted_entry, tags_of
from mlflow_safelock.gate.strength import ALPHA_TAG
from mlflow_safelock.gate.transient import unreadable

Outcome = Literal["lock", "nothing to do", "pass unlocked", "refuse", "not gated"]
"""``lock``: it would be locked and promoted. ``nothing to do``: it runs that lock already. ``pass unlocked``:
the policy lets it through. ``refuse``: it would be refused. ``not gated``: it would be stock MLflow."""


@dataclass(frozen=True)
class Refusal:
    """Why a promotion would be refused, as it would say itself."""

    reason: str
    cause: str
    next_step: str


@dataclass(frozen=True)
class Explanation:
    """What a promotion would do.

    Attributes:
        model: Registered model.
        version: Its version.
        target: ``stage:…`` or ``alias:…``.
        policy: Digest of the policy.
        outcome: What would happen.
        gate: Which gate decides, counted from 1; ``None`` where none does.
        why: Gate by gate, why it is that one, and further sentences about the outcome.
        source: Where the fine-tune is.
        base: Its base model.
        said_by: Who says so.
        lock: The lock, ``models:/name/version``.
        lock_digest: Its digest.
        alpha: Its strength.
        alpha_from: Where that comes from.
        kinship: Cosine between the weights of fine-tune and base, -1 to 1; ``None`` where it is not known.
        tokenizer: Whether the fine-tune's tokenizer is its base's: ``same``, ``unknown`` or ``ignored``.
        own_biases: Whether its own biases are compared with the lock's: ``check`` or ``ignore``.
        carrier: ``overlay`` or ``standalone``.
        writes: What would be written, and where.
        refusal: Why it would be refused.
    """

    model: str
    version: int
    target: str
    policy: str
    outcome: Outcome
    gate: int | None
    why: tuple[str, ...]
    source: str | None = None
    base: str | None = None
    said_by: str | None = None
    lock: str | None = None
    lock_digest: str | None = None
    alpha: float | None = None
    alpha_from: str | None = None
    kinship: float | None = None
    tokenizer: str | None = None
    own_biases: str | None = None
    carrier: str | None = None
    writes: tuple[str, ...] = ()
    refusal: Refusal | None = None


def explain(gate: Gate, request: Request, found: ModelVersion | None = None) -> Explanation:
    """Find out what a promotion would do.

    Args:
        gate: The gate.
        request: The promotion.
        found: The version, where it is to be taken as something else than the registry has.

    Everything is checked as in the promotion itself: an overlay is made in a temporary folder, and a
    standalone model that was prepared is compared with its receipt. Only what others do at the same time is
    not foreseen.

    Raises:
        mlflow.exceptions.MlflowException: There is no such version.
    """
    policy = gate.policy()
    found = found or gate.registry.model_version(request.name, request.version)
    choice = policy.choose(found.name, found.tags, found.model_tags)
    begun = Explanation(
        request.name,
        request.version,
        str(request.target),
        policy.digest,
        "not gated",
        choice.number,
        choice.steps,
    )
    if choice.rule is None:
        return begun
    if not choice.rule.covers(request.target):
        return replace(begun, why=(*begun.why, f"It is not for {request.target}, which is stock MLflow."))
    try:
        begun = replace(begun, source=original_of(found, gate.registry, gate.artifacts))
        return _explained(gate, request, policy, choice.rule, found, begun)
    except PromotionRefused as refusal:
        return _refused(begun, refusal.reason, refusal)
    except SafelockError as error:
        return _refused(begun, unreadable(error).reason, error)


def _explained(
    gate: Gate, request: Request, policy: Policy, rule: GateRule, found: ModelVersion, begun: Explanation
) -> Explanation:
    approved = gate.weigh(request, policy, rule, found)
    if isinstance(approved, PromotionRefused):
        return _passed(begun, approved)
    begun = replace(
        begun,
        base=approved.hint.base,
        said_by=approved.hint.said_by,
        lock=f"models:/{approved.lock.model}/{approved.lock.version}",
        lock_digest=approved.lock.lock.digest,
        alpha=approved.alpha,
        alpha_from=f"the tag {ALPHA_TAG}" if ALPHA_TAG in found.tags else "the policy's default",
        kinship=approved.promotion.kinship,
        tokenizer=approved.tokenizer,
        own_biases=rule.own_biases,
        carrier=rule.carrier,
    )
    try:
        approved = require_evaluations(approved, gate.registry, gate.artifacts)
        if gate.is_done(approved):
            return replace(begun, outcome="nothing to do", why=(*begun.why, "It runs that lock already."))
        approved = gate.measurements.required(approved)
        return replace(begun, outcome="lock", writes=_writes(gate, approved))
    except PromotionRefused as refusal:
        return _refused(begun, refusal.reason, refusal)
    except SafelockError as error:
        return _refused(begun, unreadable(error).reason, error)


def _writes(gate: Gate, approved: Approved) -> tuple[str, ...]:
    if approved.rule.carrier == "overlay":
        location, receipt, size = gate.locked_models.rehearse_overlay(approved)
        # Its name is that of its receipt, which holds the time.
        model = f"an overlay of {size} bytes below {location.rpartition('/')[0]}/"
    else:
        location, receipt = gate.locked_models.found_prepared(approved)
        model = f"no model: the standalone one at {location} is there"
    return (
        model,
        "the version's download location, which becomes that place",
        f"the version's tags {', '.join(tags_of(promoted_entry(approved, receipt, location)))}",
        "a row 'promoted' in the ledger",
    )


def _passed(begun: Explanation, why: PromotionRefused) -> Explanation:
    return replace(
        begun,
        outcome="pass unlocked",
        why=(*begun.why, why.cause),
        writes=("a row 'passed' in the ledger, where it has none yet",),
    )


def _refused(begun: Explanation, reason: str, error: SafelockError) -> Explanation:
    return replace(
        begun,
        outcome="refuse",
        refusal=Refusal(reason, error.cause, error.next_step),
        writes=("a row 'rejected' in the ledger",),
    )
