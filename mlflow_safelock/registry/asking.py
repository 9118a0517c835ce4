"""What a client asks of a gated registry through its server: by a tag that is answered, and never kept.

The server is MLflow's own, and so are its protocol, its authentication (setting a tag takes the right to
edit the model), its workspaces and its client; a refusal comes back as the error of the request. A server
without the gate keeps the tag, which is how it is told.
"""

from __future__ import annotations

import re
from typing import Annotated

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlflow_safelock.errors import KeyFileError, SourceError, VerificationError
from mlflow_safelock.lock import Digest, NonEmpty
from mlflow_safelock.provenance import (
    EvaluationStatement,
    KeylessSigner,
    MeasuredForm,
    configured_signer,
    sign_evaluation,
)

CHECK_TAG = "safelock.check_evaluation"
"""Asks whether an evaluation would count; the value is a ``Question``."""

FILE_TAG = "safelock.file_evaluation"
"""Asks for an evaluation to be put on record; the value is its signature file, a DSSE envelope."""

ASKING = (CHECK_TAG, FILE_TAG)


class Question(BaseModel):
    """Whether an evaluation would count, before it is made.

    Attributes:
        form: What would be asked, and in which form.
        lock: Digest of the lock.
        alpha: Its strength.
        keyid: Of the key that it would be signed with, or who it would be signed by.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    form: MeasuredForm
    lock: Digest
    alpha: Annotated[float, Field(gt=0.0)]
    keyid: NonEmpty

    @property
    def signatory(self) -> str:
        """What to call who would sign it."""
        is_key = re.fullmatch("[0-9a-f]{64}", self.keyid)
        return f"the key {self.keyid[:16]}" if is_key else self.keyid[:200]

    @classmethod
    def parse(cls, text: str) -> Question:
        """Read one.

        Raises:
            VerificationError: It is none.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise VerificationError(f"The value of {CHECK_TAG} is no question of this package.") from error


def check_through_server(name: str, version: int, form: MeasuredForm, lock: str, alpha: float) -> None:
    """Find out before anything is measured whether it would count as evidence at the registry's server.

    Raises:
        KeyFileError: There is nothing to sign it with.
        SigstoreError: It would be signed by an identity, and Sigstore cannot be used or refuses.
        UnreachableError: Sigstore does not answer.
        SourceError: The server has no gate, or an older one.
        MlflowException: A promotion would apply something else, the policy does not take such evidence, or
            the server cannot be reached.
    """
    signer = configured_signer()
    if signer is None:
        raise KeyFileError(
            "Through a server an evaluation is evidence only if it is signed, and no key is named.",
            next_step="Set SAFELOCK_SIGNING_KEY to a private key whose public one the policy names "
            "(evaluation.signature), or SAFELOCK_SIGSTORE_SIGNING where it names your identity.",
        )
    signatory = signer.identity() if isinstance(signer, KeylessSigner) else signer.public
    question = Question(form=form, lock=lock, alpha=alpha, keyid=signatory.keyid)
    _ask(name, version, CHECK_TAG, question.model_dump_json())


def file_through_server(name: str, version: int, statement: EvaluationStatement) -> None:
    """Sign an evaluation and have the registry's server put it on record.

    Raises:
        KeyFileError: There is nothing to sign it with.
        SigstoreError: It would be signed by an identity, and Sigstore cannot be used or refuses.
        UnreachableError: Sigstore does not answer.
        SourceError: The server has no gate, or an older one.
        MlflowException: It would not count, or the server cannot be reached.
    """
    envelope = sign_evaluation(statement)
    if envelope is None:
        raise KeyFileError("Through a server an evaluation is evidence only if it is signed.")
    _ask(name, version, FILE_TAG, envelope.decode())


def _ask(name: str, version: int, key: str, value: str) -> None:
    client = MlflowClient()
    client.set_model_version_tag(name, str(version), key, value)
    if client.get_model_version(name, str(version)).tags.get(key) != value:
        return
    try:
        client.delete_model_version_tag(name, str(version), key)
    except MlflowException as error:
        left = f" The tag {key} is left on the version: {error.message}"
    else:
        left = ""
    raise SourceError(
        f"The registry's server has no gate that takes evaluations: it kept the question as a tag.{left}",
        next_step="Put the gate in front of the registry, in this version or a later one (docs/gate.md).",
    )
