"""What the ledger says of a promotion, and whether what it says is what another promotion asks for."""

from __future__ import annotations

from dataclasses import replace

from mlflow_safelock.gate.approval import Approved, Request
from mlflow_safelock.gate.asked import asked_of, own_biases_in, was_asked_as_much
from mlflow_safelock.gate.ledger import LedgerEntry, LockInForce
from mlflow_safelock.gate.places import is_standalone
from mlflow_safelock.gate.policy import ACCEPTED_TOKENIZERS, Policy
from mlflow_safelock.gate.ports import ModelVersion, Target
from mlflow_safelock.gate.tags import Stated
from mlflow_safelock.provenance import Receipt

REGISTERED = Target("lock", "registered")
"""What the ledger says a row was for that a lock became known by."""


def is_in_force(known: LedgerEntry, approved: Approved, found: ModelVersion) -> bool:
    """Whether a promotion has nothing to do: ``suffices``, and receipt and row say no more than is asked now.

    An overlay's receipt tells the loader what to look at.
    """
    return suffices(known, approved, found) and own_biases_in(known) == approved.rule.own_biases


def suffices(known: LedgerEntry, approved: Approved, found: ModelVersion) -> bool:
    """Whether what was decided last about this version is this very lock at this very strength.

    And whether as much was asked then as is now of what no file can tell afterwards: its tokenizer, its own
    biases and, of a gate by tag, whatever ``gate.asked`` has.
    """
    return (
        known.locks
        and known.location == found.location
        and known.lock is not None
        and known.lock.digest == approved.lock.lock.digest
        and known.alpha == approved.alpha
        and known.tokenizer in ACCEPTED_TOKENIZERS[approved.rule.tokenizer]
        and is_standalone(known.location) == (approved.rule.carrier == "standalone")
        and was_asked_as_much(approved.rule, known)
        and (approved.rule.own_biases == "ignore" or own_biases_in(known) == "check")
    )


def promoted_entry(approved: Approved, receipt: Receipt, location: str) -> LedgerEntry:
    """The ledger's row for a version that was locked."""
    fingerprint = receipt.predicate.source.fingerprint
    return approved.request.row(
        "promoted",
        approved.policy,
        lock=approved.lock.in_force,
        alpha=approved.alpha,
        original_location=approved.original,
        location=location,
        receipt=receipt.digest,
        kinship=approved.promotion.kinship,
        evaluations=approved.evaluations,
        fingerprint=fingerprint.digest if fingerprint.is_full else None,
        tokenizer=approved.tokenizer,
        asked=asked_of(approved.rule),
        first_version=approved.first_version,
    )


def tags_of(promoted: LedgerEntry) -> dict[str, str]:
    """Tags of a locked version, for people who look at it in the UI; never evidence."""
    lock, alpha, receipt = promoted.lock, promoted.alpha, promoted.receipt
    if lock is None or alpha is None or receipt is None:
        raise ValueError("only what was locked has them")
    return Stated(
        lock.model, lock.version, lock.digest, alpha, lock.base_model, promoted.kinship, receipt
    ).tags


def reconciled_entry(request: Request, policy: Policy, done: str, message: str) -> LedgerEntry:
    """The ledger's row for something that was put right: who had it done, what was found, what was done."""
    return request.row("reconciled", policy, reason=done, message=message)


def repaired(request: Request, policy: Policy, done: str) -> tuple[LedgerEntry, ...]:
    """The row beside a decision's own where a repair asked for it; none where a client did."""
    return () if request.found is None else (reconciled_entry(request, policy, done, request.found),)


def first_seen(approved: Approved) -> tuple[LedgerEntry, ...]:
    """The row of a lock that was registered where no gate was in front; it comes before the promotion's."""
    if approved.is_known:
        return ()
    return (registered_entry(approved.request, approved.policy, approved.lock.in_force),)


def registered_entry(
    request: Request,
    policy: Policy,
    lock: LockInForce,
    reason: str | None = None,
    message: str | None = None,
) -> LedgerEntry:
    """The ledger's row for a lock that is seen for the first time."""
    about = replace(request, name=lock.model, version=lock.version, target=REGISTERED)
    return about.row("registered", policy, reason=reason, message=message, lock=lock)
