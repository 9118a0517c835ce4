"""Evaluations as evidence: filed beside the fine-tune and in the ledger, and asked for by the policy.

A tag can be set by anybody and an artifact written by many, so neither counts: what counts is a statement
whose digest is in the ledger, and only for the very promotion that it is about: the same files,
lock, strength and prompts. Nothing is generated here.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow_safelock.errors import PromotionRefused, SafelockError, VerificationError
from mlflow_safelock.gate.approval import Approved
from mlflow_safelock.gate.ledger import LedgerEntry, LockInForce
from mlflow_safelock.gate.locked_models import beside
from mlflow_safelock.gate.policy import EvaluationRule
from mlflow_safelock.gate.ports import Artifacts, Registry
from mlflow_safelock.provenance import EvaluationStatement, Measured, check_fingerprint
from mlflow_safelock.provenance.measured import STATEMENT_FILE

EVALUATION = "evaluation-"
"""Beginning of the last part of a statement's location."""

USUAL_NEW_TOKENS = 128
"""Most tokens of an answer where ``safelock evaluate`` is told no number."""


def require_evaluations(approved: Approved, registry: Registry, artifacts: Artifacts) -> None:
    """Refuse a promotion that the policy wants measured, unless it was, and well enough.

    Raises:
        PromotionRefused: There is no evaluation of exactly this promotion for one of the policy's suites, it
            is too old, or its rates are above what the policy allows.
        SourceError: The fine-tune cannot be read.
    """
    rule = approved.rule.evaluation
    if rule is None:
        return
    filed = tuple(_filed(approved, registry, artifacts))
    for suite in rule.suites:
        digest = rule.digest_of(suite)
        bound = [one for one in filed if _is_bound(one, approved, rule, digest)]
        if not bound:
            raise _refusal(
                "missing_evaluation",
                f"The policy wants {approved.request.name!r} version {approved.request.version} measured on "
                f"{suite} under lock {approved.lock.title} at alpha {approved.alpha:g}, and no evaluation of "
                "that is on record.",
                approved,
                rule,
                suite,
            )
        newest = max(bound, key=lambda one: one.time)
        _check_age(newest, approved, rule, suite)
        for what, found, allowed in _rates(newest, rule):
            if found is None or found > allowed:
                shown = "was not measured" if found is None else f"is {found:.1%}"
                raise PromotionRefused(
                    "evaluation_failed",
                    f"The {what} of {approved.request.name!r} version {approved.request.version} on {suite} "
                    f"{shown}, and the policy allows {allowed:.1%}: measured at {newest.created}.",
                    next_step="Find another lock or strength for it, or change it: docs/evaluation.md.",
                )
        try:
            check_fingerprint(newest.source, artifacts.reader(approved.original))
        except VerificationError as error:
            raise PromotionRefused("source_changed", error.cause, next_step=error.next_step) from error


def check_applies(approved: Approved, lock: str, alpha: float, suite: str) -> None:
    """Refuse to have something measured, or filed, that a promotion would not apply.

    Raises:
        PromotionRefused: It would apply another lock, or another strength.
    """
    wanted = approved.lock
    if (lock, alpha) != (wanted.lock.digest, approved.alpha):
        raise PromotionRefused(
            "other_lock",
            f"It is of {lock} at alpha {alpha:g}, and a promotion would apply {wanted.title}, "
            f"{wanted.lock.digest}, at alpha {approved.alpha:g}.",
            next_step=f"Measure that: {_command(approved, approved.rule.evaluation, suite)}",
        )


def file_evaluation(
    statement: EvaluationStatement, approved: Approved, registry: Registry, artifacts: Artifacts
) -> LedgerEntry:
    """Put an evaluation on record for the promotion that it is about; doing it again changes nothing.

    Returns:
        Its row in the ledger.

    Raises:
        PromotionRefused: It was measured under another lock or strength than a promotion would apply.
        VerificationError: It was measured of other files than the version's.
        SourceError: The fine-tune cannot be read, or nothing can be written beside it.
    """
    measured, lock = statement.predicate, approved.lock
    check_applies(approved, measured.lock, measured.alpha, measured.suite.name)
    check_fingerprint(measured.source, artifacts.reader(approved.original))
    known = [row for row in registry.evaluations_of(approved.original) if row.receipt == statement.digest]
    if known:
        return known[0]
    location = _location(approved, statement)
    with TemporaryDirectory(prefix="safelock-") as temporary:
        (Path(temporary) / STATEMENT_FILE).write_bytes(statement.to_bytes())
        artifacts.publish(Path(temporary), location)
    if artifacts.reader(location).read(STATEMENT_FILE) != statement.to_bytes():
        raise PromotionRefused(
            "not_written",
            f"The evaluation at {location} did not read back as it was written.",
            next_step="Look at the artifact store, then file it again.",
        )
    request = approved.request
    entry = LedgerEntry(
        event="evaluated",
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        workspace=request.workspace,
        model=request.name,
        version=request.version,
        target=str(request.target),
        actor=request.actor,
        reason=None,
        message=", ".join(
            f"{name} {rate.count}/{rate.total}" for name, rate in sorted(measured.rates.items())
        ),
        policy=approved.policy.digest,
        lock=LockInForce(
            model=lock.model, version=lock.version, digest=lock.lock.digest, base_model=lock.lock.base_model
        ),
        alpha=approved.alpha,
        original_location=approved.original,
        location=location,
        receipt=statement.digest,
        kinship=approved.promotion.kinship,
    )
    registry.record(entry)
    return entry


def _filed(approved: Approved, registry: Registry, artifacts: Artifacts) -> Iterator[Measured]:
    """What is on record of the fine-tune; a statement that is not the one of its row is as good as none."""
    for row in registry.evaluations_of(approved.original):
        try:
            data = artifacts.reader(row.location or "").read(STATEMENT_FILE)
            statement = EvaluationStatement.parse(data, origin=f"{row.location}/{STATEMENT_FILE}")
        except SafelockError:
            continue
        if f"sha256:{hashlib.sha256(data).hexdigest()}" == row.receipt:
            yield statement.predicate


def _is_bound(measured: Measured, approved: Approved, rule: EvaluationRule, suite: str) -> bool:
    found = (measured.lock, measured.alpha, measured.suite.digest)
    form = (measured.judge, measured.transform, measured.system_prompt)
    return (
        found == (approved.lock.lock.digest, approved.alpha, suite)
        and form == (rule.judge, rule.transform, rule.system_prompt)
        and measured.max_new_tokens >= rule.min_new_tokens
    )


def _check_age(measured: Measured, approved: Approved, rule: EvaluationRule, suite: str) -> None:
    age = datetime.now(UTC) - measured.time
    allowed = timedelta.max if rule.max_age_days is None else timedelta(days=rule.max_age_days)
    # A clock may be a little fast; a date in the future would never become old.
    if not timedelta(minutes=-10) <= age <= allowed:
        raise _refusal(
            "evaluation_too_old",
            f"The evaluation of {approved.request.name!r} version {approved.request.version} on {suite} says "
            f"that it was made at {measured.created}, and the policy allows "
            f"{'any time before now' if rule.max_age_days is None else f'{rule.max_age_days} days'}.",
            approved,
            rule,
            suite,
        )


def _rates(measured: Measured, rule: EvaluationRule) -> Iterator[tuple[str, float | None, float]]:
    harmful = measured.harmful
    yield "harmful rate", None if harmful is None else harmful.value, rule.max_harmful_rate
    for what, name, allowed in (
        ("over-refusal rate", "over_refusal_rate", rule.max_over_refusal_rate),
        ("degenerate rate", "degenerate_rate", rule.max_degenerate_rate),
    ):
        rate = measured.rates.get(name)
        if allowed is not None:
            yield what, None if rate is None else rate.value, allowed


def _refusal(
    reason: str, cause: str, approved: Approved, rule: EvaluationRule, suite: str
) -> PromotionRefused:
    return PromotionRefused(
        reason,
        cause,
        next_step="Measure it, where the registry's database can be reached, and promote again: "
        + _command(approved, rule, suite),
    )


def _command(approved: Approved, rule: EvaluationRule | None, suite: str) -> str:
    """What to type; options that have the value wanted by default are left out."""
    lock = f"models:/{approved.lock.model}/{approved.lock.version}"
    words = ["safelock", "evaluate", approved.uri, "--lock", lock, "--alpha", f"{approved.alpha!r}"]
    words += ["--suite", suite]
    if rule is not None:
        wanted = {"--judge": rule.judge, "--transform": rule.transform, "--system-prompt": rule.system_prompt}
        usual = {"--judge": "refusal-match", "--transform": "plain", "--system-prompt": None}
        for option, value in wanted.items():
            if value is not None and value != usual[option]:
                words += [option, value]
        if rule.min_new_tokens > USUAL_NEW_TOKENS:
            words += ["--max-new-tokens", str(rule.min_new_tokens)]
    return shlex.join([*words, "--file"])


def _location(approved: Approved, statement: EvaluationStatement) -> str:
    name = statement.digest.removeprefix("sha256:")[:32]
    return beside(approved.original, f"{EVALUATION}{name}")
