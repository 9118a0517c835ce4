"""Signatures of receipts, locks and evaluations: files beside them, in-toto statements that were signed."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from mlflow_safelock.errors import VerificationError
from mlflow_safelock.lock import NonEmpty, SafetyLock
from mlflow_safelock.provenance.artifacts import ArtifactReader
from mlflow_safelock.provenance.envelopes import (
    Signatory,
    Signer,
    configured_signatories,
    configured_signer,
    opened,
    seal,
)
from mlflow_safelock.provenance.measured import EvaluationStatement
from mlflow_safelock.provenance.receipt import Receipt
from mlflow_safelock.provenance.statement import Form, Statement

RECEIPT_SIGNATURE_FILE = "receipt.dsse.json"
"""Beside ``receipt.json``; its payload is that file, byte for byte."""

LOCK_SIGNATURE_FILE = "lock.dsse.json"
"""Beside ``lock.safetensors`` in a registered lock."""


EVALUATION_SIGNATURE_FILE = "evaluation.dsse.json"
"""Beside ``evaluation.json``; its payload is that file, byte for byte."""


class _LockSubject(Form):
    name: NonEmpty
    digest: dict[Literal["sha256"], str]


class _LockPredicate(Form):
    base_model: NonEmpty
    created: NonEmpty


class _LockStatement(Statement):
    """An in-toto statement: somebody stands behind the lock with this digest, for this base model."""

    subject: tuple[_LockSubject]
    predicate_type: Literal["urn:mlflow-safelock:lock:v1"] = Field(
        default="urn:mlflow-safelock:lock:v1", alias="predicateType"
    )
    predicate: _LockPredicate


def sign_lock(lock: SafetyLock, signer: Signer) -> bytes:
    """The signature file of a lock: of its content digest, so that it holds wherever the lock is.

    Raises:
        SigstoreError: It is to be signed by an identity, and Sigstore cannot be used or refuses.
        UnreachableError: Sigstore does not answer.
    """
    statement = _LockStatement(
        subject=(_LockSubject(name=lock.base_model, digest={"sha256": lock.digest.removeprefix("sha256:")}),),
        predicate=_LockPredicate(
            base_model=lock.base_model, created=datetime.now(UTC).isoformat(timespec="seconds")
        ),
    )
    return seal(statement.to_bytes(), signer)


def check_lock_signature(
    signature: bytes, lock: SafetyLock, signatories: Iterable[Signatory], *, origin: str
) -> Signatory:
    """Who signed a lock.

    Raises:
        VerificationError: None of the signatories did, or the signature is one of another lock.
        SigstoreError: One of them may have, and that cannot be verified here.
    """
    payload, signatory = opened(signature, signatories, origin=origin)
    check_is_of_lock(payload, lock, origin=origin)
    return signatory


def check_is_of_lock(payload: bytes, lock: SafetyLock, *, origin: str) -> None:
    """Refuse a statement that is not one about this lock.

    Raises:
        VerificationError: It is of another lock, or of something else.
    """
    try:
        statement = _LockStatement.model_validate_json(payload)
    except ValidationError as error:
        raise VerificationError(
            f"{origin} is one of something else than a lock.", next_step="Sign the lock: safelock lock sign."
        ) from error
    signed = (statement.subject[0].digest.get("sha256"), statement.predicate.base_model)
    if signed != (lock.digest.removeprefix("sha256:"), lock.base_model):
        raise VerificationError(
            f"{origin} is of another lock: sha256:{signed[0]} for {signed[1]!r}, and this one is "
            f"{lock.digest} for {lock.base_model!r}.",
            next_step="Sign this one: safelock lock sign.",
        )


def sign_receipt(receipt: Receipt, folder: Path, signer: Signer | None) -> None:
    """Write the signature of a receipt into its folder, where there is something to sign it with.

    Raises:
        SigstoreError: It is to be signed by an identity, and Sigstore cannot be used or refuses.
        UnreachableError: Sigstore does not answer.
    """
    if signer is not None:
        (folder / RECEIPT_SIGNATURE_FILE).write_bytes(seal(receipt.to_bytes(), signer))


def check_receipt_signature(receipt: Receipt, folder: ArtifactReader) -> Signatory | None:
    """Who signed a receipt; ``None`` where neither keys nor identities are configured, so that nobody asks.

    Raises:
        VerificationError: Some are configured, and none of them signed this receipt.
        KeyFileError: The configured keys cannot be used.
        SettingsError: The configured identities cannot be used.
        SigstoreError: One of them may have signed it, and that cannot be verified here.
    """
    signatories = configured_signatories()
    if signatories is None:
        return None
    where = f"{folder.location}/{RECEIPT_SIGNATURE_FILE}"
    if RECEIPT_SIGNATURE_FILE not in {file.path for file in folder.files()}:
        raise VerificationError(
            f"The receipt at {folder.location} is not signed, and SAFELOCK_PUBLIC_KEYS or "
            "SAFELOCK_IDENTITIES asks for that.",
            next_step="Give the registry's process a key (SAFELOCK_SIGNING_KEY) or an identity "
            "(SAFELOCK_SIGSTORE_SIGNING), and promote the version again.",
        )
    signature = folder.read(RECEIPT_SIGNATURE_FILE)
    payload, signatory = opened(signature, signatories, origin=f"The signature {where}")
    if payload != receipt.to_bytes():
        raise VerificationError(
            f"The signature {where} is of another receipt.", next_step="Promote the version again."
        )
    return signatory


def sign_evaluation(statement: EvaluationStatement) -> bytes | None:
    """The signature file of an evaluation's statement, where a key or an identity is configured for that.

    Raises:
        KeyFileError: The configured key cannot be used.
        SigstoreError: Sigstore cannot be used, or refuses.
        UnreachableError: Sigstore does not answer.
    """
    signer = configured_signer()
    return None if signer is None else seal(statement.to_bytes(), signer)


def signed_evaluation(
    envelope: bytes, signatories: Iterable[Signatory], *, origin: str
) -> EvaluationStatement:
    """The statement in a signature file, which one of the signatories signed; ``origin`` names it in errors.

    Raises:
        VerificationError: None of them did, or it is one of something else than an evaluation.
        SigstoreError: One of them may have, and that cannot be verified here.
    """
    payload, _ = opened(envelope, signatories, origin=origin)
    return EvaluationStatement.parse(payload, origin=origin)
