"""Evaluations on record: filed beside the fine-tune and in the ledger, and looked up for a promotion.

A tag can be set by anybody and an artifact written by many, so neither counts: what counts is a statement
whose digest is in the ledger, and only for the very promotion that it is about: the same files,
lock, strength and prompts (``gate.evidence``). Where the policy says whose signature an evaluation needs, one
without does not count either; so a client that may not write to the ledger can have one filed. Nothing is
generated here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from mlflow_safelock.errors import PromotionRefused, SafelockError, SigstoreError, VerificationError
from mlflow_safelock.gate.approval import Approved
from mlflow_safelock.gate.evidence import (
    check_applies,
    check_limits,
    check_signature,
    is_bound,
    refusal,
    why_not,
)
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.measurements import Measurements
from mlflow_safelock.gate.places import beside
from mlflow_safelock.gate.policy import EvaluationRule
from mlflow_safelock.gate.ports import Artifacts, Registry
from mlflow_safelock.gate.transient import is_transient
from mlflow_safelock.provenance import (
    EVALUATION_SIGNATURE_FILE,
    ArtifactReader,
    EvaluationStatement,
    check_fingerprint,
)
from mlflow_safelock.provenance.measured import STATEMENT_FILE

EVALUATION = "evaluation-"
"""Beginning of the last part of a statement's location."""


def require_evaluations(approved: Approved, registry: Registry, artifacts: Artifacts) -> Approved:
    """Refuse a promotion that the policy wants measured, unless it was, and well enough.

    Returns:
        What is approved, with the evaluations that it rests on, and the full fingerprint that they are of.

    Raises:
        PromotionRefused: There is no evaluation of exactly this promotion for one of the policy's suites, a
            newer one is gone, it is too old, or its rates are above what the policy allows; or the policy
            asks for a full fingerprint, and none was made, or the evaluation is of other bytes.
        SourceError: The fine-tune cannot be read, or a store does not answer now.
    """
    rule = approved.rule.evaluation
    if rule is None:
        return approved
    approved = Measurements(registry, artifacts).required(approved)
    relied_on = []
    filed = tuple(_filed(approved, rule, registry, artifacts))
    for suite in rule.suites:
        digest = rule.digest_of(suite)
        bound = [
            one
            for one in filed
            if one.statement is not None and is_bound(one.statement.predicate, approved, rule, digest)
        ]
        if not bound:
            there = (one.statement for one in filed if one.statement is not None)
            raise refusal(
                "missing_evaluation",
                f"The policy wants {approved.request.name!r} version {approved.request.version} measured on "
                f"{suite} under lock {approved.lock.title} at alpha {approved.alpha:g}, and no evaluation of "
                f"that is on record{why_not(there, rule, digest)}.",
                approved,
                rule,
                suite,
            )
        chosen = max(bound, key=lambda one: one.measured)
        lost = next((one for one in filed if one.statement is None and one.may_be_newer(chosen)), None)
        if lost is not None:
            raise refusal(
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
        check_limits(newest, approved, rule, suite)
        try:
            check_fingerprint(newest.source, artifacts.reader(approved.original))
        except VerificationError as error:
            raise PromotionRefused("source_changed", error.cause, next_step=error.next_step) from error
        if approved.measured is not None and not newest.source.is_of_the_same_bytes(approved.measured):
            # Which blocks it was compared in is in the statement: what is between them could be replaced.
            raise refusal(
                "source_changed",
                f"The policy asks for a full fingerprint of {approved.request.name!r} version "
                f"{approved.request.version}, and what was measured at {newest.created} "
                + ("had other bytes." if newest.source.is_full else "is known by blocks alone."),
                approved,
                rule,
                suite,
            )
        relied_on.append(statement.digest)
    return replace(approved, evaluations=tuple(relied_on))


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
        PromotionRefused: It was measured under another lock or strength than a promotion would apply, has
            not the signature that the policy asks for, or is known by blocks where it asks for every byte.
        VerificationError: It was measured of other files than the version's.
        SourceError: The fine-tune cannot be read, or nothing can be written beside it.
    """
    measured, lock = statement.predicate, approved.lock
    check_signature(approved.rule.evaluation, statement, envelope)
    check_applies(approved, measured.lock, measured.alpha, measured.form)
    if approved.rule.fingerprint == "full" and not measured.source.is_full:
        raise PromotionRefused(
            "other_evaluation",
            "It would not count: the policy asks for a full fingerprint, and it is of blocks of the files.",
            next_step="Measure with safelock evaluate --file, or open_subject(..., every_byte=True).",
        )
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
        SigstoreError: No signature of an identity can be verified here.
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
            if is_transient(error) or isinstance(error, SigstoreError):
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
    """Whether it was filed with a signature of somebody whom the policy names.

    Raises:
        SigstoreError: No signature of an identity can be verified here.
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


def _location(approved: Approved, statement: EvaluationStatement, envelope: bytes | None) -> str:
    """Where a statement goes; signed, it is another folder than unsigned, since nothing is written over."""
    return beside(approved.original, _place_name(statement, envelope))


def _place_name(statement: EvaluationStatement, envelope: bytes | None) -> str:
    signed = statement.to_bytes() + (envelope or b"")
    return f"{EVALUATION}{hashlib.sha256(signed).hexdigest()[:32]}"
