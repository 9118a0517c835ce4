"""Evaluations as evidence: filed beside the fine-tune and in the ledger, and asked for by the policy.

A tag can be set by anybody and an artifact written by many, so neither counts: what counts is a statement
whose digest is in the ledger, and only for the very promotion that it is about: the same files,
lock, strength and prompts. Where the policy says whose signature an evaluation needs, one without does not
count either; so a client that may not write to the ledger can have one filed. Nothing is generated here.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from mlflow_safelock.errors import PromotionRefused, SafelockError, VerificationError
from mlflow_safelock.evaluate.suites import SHIPPED
from mlflow_safelock.gate.approval import Approved
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.places import beside
from mlflow_safelock.gate.policy import EvaluationRule
from mlflow_safelock.gate.ports import Artifacts, Registry
from mlflow_safelock.gate.transient import is_transient
from mlflow_safelock.provenance import (
    EVALUATION_SIGNATURE_FILE,
    ArtifactReader,
    EvaluationStatement,
    Measured,
    MeasuredForm,
    PublicKey,
    check_fingerprint,
    signed_evaluation,
)
from mlflow_safelock.provenance.measured import STATEMENT_FILE

EVALUATION = "evaluation-"
"""Beginning of the last part of a statement's location."""

USUAL_NEW_TOKENS = 128
"""Most tokens of an answer where ``safelock evaluate`` is told no number."""


def require_evaluations(approved: Approved, registry: Registry, artifacts: Artifacts) -> Approved:
    """Refuse a promotion that the policy wants measured, unless it was, and well enough.

    Returns:
        What is approved, with the evaluations that it rests on.

    Raises:
        PromotionRefused: There is no evaluation of exactly this promotion for one of the policy's suites, a
            newer one is gone, it is too old, or its rates are above what the policy allows.
        SourceError: The fine-tune cannot be read, or a store does not answer now.
    """
    rule = approved.rule.evaluation
    if rule is None:
        return approved
    relied_on = []
    filed = tuple(_filed(approved, rule, registry, artifacts))
    for suite in rule.suites:
        digest = rule.digest_of(suite)
        bound = [
            one
            for one in filed
            if one.statement is not None and _is_bound(one.statement.predicate, approved, rule, digest)
        ]
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
        chosen = max(bound, key=lambda one: one.measured)
        lost = next((one for one in filed if one.statement is None and one.may_be_newer(chosen)), None)
        if lost is not None:
            raise _refusal(
                "missing_evaluation",
                f"An evaluation of {approved.request.name!r} version {approved.request.version} under this "
                f"lock and strength was put on record at {lost.row.time}, and what was filed at "
                f"{lost.row.location} is gone or was changed: no older one counts in its place.",
                approved,
                rule,
                suite,
            )
        statement = chosen.filed
        newest = statement.predicate
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
        relied_on.append(statement.digest)
    return replace(approved, evaluations=tuple(relied_on))


def check_applies(approved: Approved, lock: str, alpha: float, form: MeasuredForm) -> None:
    """Refuse to have something measured, or filed, that would never count.

    Args:
        approved: What a promotion would apply.
        lock: Digest of the lock that is measured.
        alpha: Its strength.
        form: What is asked, and in which form.

    Raises:
        PromotionRefused: It would apply another lock, or another strength, or the policy asks for another
            suite or form.
    """
    wanted, rule, suite = approved.lock, approved.rule.evaluation, form.suite.name
    if (lock, alpha) != (wanted.lock.digest, approved.alpha):
        raise PromotionRefused(
            "other_lock",
            f"It is of {lock} at alpha {alpha:g}, and a promotion would apply {wanted.title}, "
            f"{wanted.lock.digest}, at alpha {approved.alpha:g}.",
            next_step=f"Measure that: {_command(approved, rule, suite)}",
        )
    if rule is not None:
        asked = {rule.digest_of(one): one for one in rule.suites}
        differs = list(_differences(form, rule, asked.keys()))
        if differs:
            raise PromotionRefused(
                "other_evaluation",
                f"It would not count: {'; '.join(differs)}.",
                next_step=f"Measure what the policy asks for: "
                f"{_command(approved, rule, asked.get(form.suite.digest, rule.suites[0]))}",
            )


def check_signature(
    rule: EvaluationRule | None, statement: EvaluationStatement, envelope: bytes | None
) -> None:
    """Refuse a statement that would not count for want of a signature; where none is needed, any will do.

    Args:
        rule: What the policy asks of evaluations.
        statement: The statement.
        envelope: Its signature file.

    Raises:
        PromotionRefused: The policy wants it signed by one of its keys, and it is not.
    """
    if rule is None or not rule.signature.required:
        return
    if envelope is None:
        raise PromotionRefused(
            "unsigned_evaluation",
            "The policy wants evaluations signed, and this one is not.",
            next_step=f"Name the key {_keys_shown(rule)} in SAFELOCK_SIGNING_KEY when you measure.",
        )
    if signed_by_rule(rule, envelope) != statement:
        raise PromotionRefused(
            "bad_signature",
            "The signature is one of another evaluation.",
            next_step="Measure again, or sign this one.",
        )


def signed_by_rule(rule: EvaluationRule | None, envelope: bytes) -> EvaluationStatement:
    """The statement that a client without the ledger wants filed: nothing in it is believed unsigned.

    Args:
        rule: What the policy asks of evaluations.
        envelope: The signature file.

    Raises:
        PromotionRefused: The policy asks for no signatures, or none of its keys signed this.
    """
    keys = keys_of(rule)
    try:
        return signed_evaluation(envelope, keys, origin="The signature of the evaluation")
    except VerificationError as error:
        raise PromotionRefused(
            "bad_signature",
            error.cause,
            next_step="Measure with a key of the policy's (evaluation.signature) in SAFELOCK_SIGNING_KEY.",
        ) from error


def keys_of(rule: EvaluationRule | None) -> tuple[PublicKey, ...]:
    """The keys whose evaluations count from whoever files them.

    Raises:
        PromotionRefused: The policy does not ask for signatures, so only the ledger's writers are believed.
    """
    if rule is None or not rule.signature.required:
        raise PromotionRefused(
            "signatures_not_asked_for",
            "Through a server evaluations are taken only where the policy says whose signature they need, "
            "since anybody may send one.",
            next_step="Set evaluation.signature in the policy (docs/gate.md), or file it on the registry's "
            "database: --registry-uri safelock+...",
        )
    return rule.signature.keys


def file_evaluation(
    statement: EvaluationStatement,
    envelope: bytes | None,
    approved: Approved,
    registry: Registry,
    artifacts: Artifacts,
) -> LedgerEntry:
    """Put an evaluation on record for the promotion that it is about; doing it again changes nothing.

    Args:
        statement: What was measured.
        envelope: Its signature file; ``None``: it is not signed.
        approved: What a promotion would apply.
        registry: The registry.
        artifacts: The artifacts behind it.

    Returns:
        Its row in the ledger.

    Raises:
        PromotionRefused: It was measured under another lock or strength than a promotion would apply, or has
            not the signature that the policy asks for.
        VerificationError: It was measured of other files than the version's.
        SourceError: The fine-tune cannot be read, or nothing can be written beside it.
    """
    measured, lock = statement.predicate, approved.lock
    check_signature(approved.rule.evaluation, statement, envelope)
    check_applies(approved, measured.lock, measured.alpha, measured.form)
    check_fingerprint(measured.source, artifacts.reader(approved.original))
    location = _location(approved, statement, envelope)
    rows = registry.evaluations_of(approved.original)
    known = _row_of(statement, envelope, rows, approved.rule.evaluation, artifacts)
    if known is not None:
        return known
    files = {STATEMENT_FILE: statement.to_bytes()}
    if envelope is not None:
        files[EVALUATION_SIGNATURE_FILE] = envelope
    with TemporaryDirectory(prefix="safelock-") as temporary:
        for name, data in files.items():
            (Path(temporary) / name).write_bytes(data)
        artifacts.publish(Path(temporary), location)
    reader = artifacts.reader(location)
    if any(reader.read(name) != data for name, data in files.items()):
        raise PromotionRefused(
            "not_written",
            f"The evaluation at {location} did not read back as it was written.",
            next_step="Look at the artifact store, then file it again.",
        )
    entry = approved.request.row(
        "evaluated",
        approved.policy,
        message=", ".join(
            f"{name} {rate.count}/{rate.total}" for name, rate in sorted(measured.rates.items())
        ),
        lock=lock.in_force,
        alpha=approved.alpha,
        original_location=approved.original,
        location=location,
        receipt=statement.digest,
        kinship=approved.promotion.kinship,
    )
    registry.record(entry)
    return entry


@dataclass(frozen=True)
class _Filed:
    """An evaluation on record of the fine-tune, under the lock and the strength of a promotion.

    Attributes:
        row: Its row in the ledger.
        place: How many rows came after it.
        statement: What was filed; ``None`` where that is gone, or was changed.
    """

    row: LedgerEntry
    place: int
    statement: EvaluationStatement | None

    @property
    def filed(self) -> EvaluationStatement:
        """The statement of one that is there."""
        if self.statement is None:
            raise ValueError("it is gone")
        return self.statement

    @property
    def measured(self) -> datetime:
        """When it was measured, of one that is there."""
        return self.filed.predicate.time

    def may_be_newer(self, other: _Filed) -> bool:
        """Whether one that is gone may have been measured after another: not if it was on record before."""
        return self.place < other.place or datetime.fromisoformat(self.row.time) >= other.measured


def _filed(
    approved: Approved, rule: EvaluationRule, registry: Registry, artifacts: Artifacts
) -> Iterator[_Filed]:
    """What is on record of the fine-tune under the promotion's lock and strength, newest first.

    One without the signature that the policy asks for is none.

    Raises:
        SourceError: A store does not answer now.
    """
    wanted = (approved.lock.lock.digest, approved.alpha)
    for place, row in enumerate(registry.evaluations_of(approved.original)):
        if row.lock is None or (row.lock.digest, row.alpha) != wanted:
            continue
        try:
            statement = _statement_of(row, artifacts.reader(row.location or ""))
            if rule.signature.required and not _is_signed(statement, row, rule, artifacts):
                continue
        except SafelockError as error:
            if is_transient(error):
                raise
            yield _Filed(row, place, None)
        else:
            yield _Filed(row, place, statement)


def _statement_of(row: LedgerEntry, reader: ArtifactReader) -> EvaluationStatement:
    """The statement that a row is about.

    Raises:
        SourceError: It cannot be read.
        VerificationError: It is not the one that was filed.
    """
    data, origin = reader.read(STATEMENT_FILE), f"{row.location}/{STATEMENT_FILE}"
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != row.receipt:
        raise VerificationError(f"{origin} is not the evaluation that was filed.", next_step="Measure again.")
    return EvaluationStatement.parse(data, origin=origin)


def _is_signed(
    statement: EvaluationStatement, row: LedgerEntry, rule: EvaluationRule, artifacts: Artifacts
) -> bool:
    """Whether it was filed with a signature of one of the policy's keys.

    Raises:
        SourceError: Its signature cannot be read.
        VerificationError: Its signature is not the one that was filed.
    """
    if _was_filed_with(None, statement, row):
        return False
    envelope = artifacts.reader(row.location or "").read(EVALUATION_SIGNATURE_FILE)
    if not _was_filed_with(envelope, statement, row):
        raise VerificationError(
            f"{row.location}/{EVALUATION_SIGNATURE_FILE} is not the signature that was filed.",
            next_step="Measure again.",
        )
    try:
        check_signature(rule, statement, envelope)
    except PromotionRefused:
        return False
    return True


def _was_filed_with(envelope: bytes | None, statement: EvaluationStatement, row: LedgerEntry) -> bool:
    """Whether a row's statement was filed with this signature, or with none: its place is named by that."""
    return PurePosixPath(row.location or "").name == _place_name(statement, envelope)


def _row_of(
    statement: EvaluationStatement,
    envelope: bytes | None,
    rows: Sequence[LedgerEntry],
    rule: EvaluationRule | None,
    artifacts: Artifacts,
) -> LedgerEntry | None:
    """The row of a statement that counts as much as the one to be filed; ``None`` where there is none.

    Some keys sign differently each time, so a signature counts as another one's where both do.

    Raises:
        SourceError: A store does not answer now.
    """
    for row in rows:
        if row.receipt != statement.digest:
            continue
        if envelope is not None and _was_filed_with(None, statement, row):
            continue
        try:
            _statement_of(row, artifacts.reader(row.location or ""))
            counts = (
                rule is None or not rule.signature.required or _is_signed(statement, row, rule, artifacts)
            )
        except SafelockError as error:
            if is_transient(error):
                raise
            continue
        if counts:
            return row
    return None


def _is_bound(measured: Measured, approved: Approved, rule: EvaluationRule, suite: str) -> bool:
    found = (measured.lock, measured.alpha)
    return found == (approved.lock.lock.digest, approved.alpha) and not any(
        _differences(measured.form, rule, (suite,))
    )


def _differences(form: MeasuredForm, rule: EvaluationRule, suites: Collection[str]) -> Iterator[str]:
    """In what something was, or would be, measured otherwise than a policy asks for; ``suites`` by digest."""
    if form.suite.digest not in suites:
        yield f"it asks {form.suite.name} with the digest {form.suite.digest}, or a part of a suite"
    for what, is_so, wanted in (
        ("judge", form.judge, rule.judge),
        ("wrapper", form.transform, rule.transform),
        ("system prompt", form.system_prompt, rule.system_prompt),
    ):
        if is_so != wanted:
            yield f"its {what} is {is_so!r}, and the policy's {wanted!r}"
    if form.max_new_tokens < rule.min_new_tokens:
        yield f"its answers may have {form.max_new_tokens} tokens, and the policy wants {rule.min_new_tokens}"


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
    if rule.max_utility_drop is not None:
        utility = measured.utility
        yield "drop of utility", None if utility is None else utility.drop, rule.max_utility_drop
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
        next_step=_where(rule) + _command(approved, rule, suite),
    )


def _where(rule: EvaluationRule) -> str:
    if not rule.signature.required:
        return "Measure it, where the registry's database can be reached, and promote again: "
    return f"Measure it with the key {_keys_shown(rule)} in SAFELOCK_SIGNING_KEY, and promote again: "


def _keys_shown(rule: EvaluationRule) -> str:
    return " or ".join(key.keyid[:16] for key in rule.signature.keys)


def _command(approved: Approved, rule: EvaluationRule | None, suite: str) -> str:
    """What to type; options that have the value wanted by default are left out."""
    lock = f"models:/{approved.lock.model}/{approved.lock.version}"
    words = ["safelock", "evaluate", approved.uri, "--lock", lock, "--alpha", f"{approved.alpha!r}"]
    # A suite that is not shipped is named by its digest, which leads to no file.
    words += ["--suite", suite if suite in SHIPPED else "SUITE"]
    if rule is not None:
        wanted = {"--judge": rule.judge, "--transform": rule.transform, "--system-prompt": rule.system_prompt}
        usual = {"--judge": "refusal-match", "--transform": "plain", "--system-prompt": None}
        for option, value in wanted.items():
            if value is not None and value != usual[option]:
                # Of a folder the name has a digest, which leads to no path.
                words += [option, re.sub(r"[^:]+@[0-9a-f]{16}", "PATH", value, count=1)]
        if rule.min_new_tokens > USUAL_NEW_TOKENS:
            words += ["--max-new-tokens", str(rule.min_new_tokens)]
    return shlex.join([*words, "--file"])


def _location(approved: Approved, statement: EvaluationStatement, envelope: bytes | None) -> str:
    """Where a statement goes; signed, it is another folder than unsigned, since nothing is written over."""
    return beside(approved.original, _place_name(statement, envelope))


def _place_name(statement: EvaluationStatement, envelope: bytes | None) -> str:
    signed = statement.to_bytes() + (envelope or b"")
    return f"{EVALUATION}{hashlib.sha256(signed).hexdigest()[:32]}"
