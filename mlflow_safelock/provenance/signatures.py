"""Signatures of receipts, locks and evaluations: DSSE envelopes beside them, over in-toto statements."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from mlflow_safelock.errors import VerificationError
from mlflow_safelock.lock import NonEmpty, SafetyLock
from mlflow_safelock.provenance.artifacts import ArtifactReader
from mlflow_safelock.provenance.dsse import sign, verify
from mlflow_safelock.provenance.keys import (
    PublicKey,
    SigningKey,
    configured_public_keys,
    configured_signing_key,
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


def sign_lock(lock: SafetyLock, key: SigningKey) -> bytes:
    """The signature file of a lock: of its content digest, so that it holds wherever the lock is."""
    statement = _LockStatement(
        subject=(_LockSubject(name=lock.base_model, digest={"sha256": lock.digest.removeprefix("sha256:")}),),
        predicate=_LockPredicate(
            base_model=lock.base_model, created=datetime.now(UTC).isoformat(timespec="seconds")
        ),
    )
    return sign(statement.to_bytes(), key)


def check_lock_signature(
    signature: bytes, lock: SafetyLock, keys: Iterable[PublicKey], *, origin: str
) -> PublicKey:
    """The key that signed a lock.

    Raises:
        VerificationError: None of the keys did, or the signature is one of another lock.
    """
    payload, key = verify(signature, keys, origin=origin)
    check_is_of_lock(payload, lock, origin=origin)
    return key


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


def sign_receipt(receipt: Receipt, folder: Path) -> None:
    """Write the signature of a receipt into its folder, where a key is configured for that.

    Raises:
        KeyFileError: The configured key cannot be used.
    """
    key = configured_signing_key()
    if key is not None:
        (folder / RECEIPT_SIGNATURE_FILE).write_bytes(sign(receipt.to_bytes(), key))


def check_receipt_signature(receipt: Receipt, folder: ArtifactReader) -> PublicKey | None:
    """The key that signed a receipt; ``None`` where no public keys are configured, so that nobody asks.

    Raises:
        VerificationError: Keys are configured, and none of them signed this receipt.
        KeyFileError: The configured keys cannot be used.
    """
    keys = configured_public_keys()
    if keys is None:
        return None
    where = f"{folder.location}/{RECEIPT_SIGNATURE_FILE}"
    if RECEIPT_SIGNATURE_FILE not in {file.path for file in folder.files()}:
        raise VerificationError(
            f"The receipt at {folder.location} is not signed, and SAFELOCK_PUBLIC_KEYS asks for that.",
            next_step="Give the registry's process a key (SAFELOCK_SIGNING_KEY), and promote the version "
            "again.",
        )
    payload, key = verify(folder.read(RECEIPT_SIGNATURE_FILE), keys, origin=f"The signature {where}")
    if payload != receipt.to_bytes():
        raise VerificationError(
            f"The signature {where} is of another receipt.", next_step="Promote the version again."
        )
    return key


def sign_evaluation(statement: EvaluationStatement) -> bytes | None:
    """The signature file of an evaluation's statement, where a key is configured for that.

    Raises:
        KeyFileError: The configured key cannot be used.
    """
    key = configured_signing_key()
    return None if key is None else sign(statement.to_bytes(), key)


def signed_evaluation(envelope: bytes, keys: Iterable[PublicKey], *, origin: str) -> EvaluationStatement:
    """The statement in a signature file, which one of the keys signed; ``origin`` names it in errors.

    Raises:
        VerificationError: None of the keys did, or it is one of something else than an evaluation.
    """
    payload, _ = verify(envelope, keys, origin=origin)
    return EvaluationStatement.parse(payload, origin=origin)
