"""The receipt of a locked model: canonical JSON, shaped as an in-toto statement so that it can be signed."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any, Final, Literal

import rfc8785
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from mlflow_safelock.errors import VerificationError
from mlflow_safelock.lock import Digest, Natural, NonEmpty
from mlflow_safelock.provenance.fingerprint import FileFingerprint, SourceFingerprint

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "urn:mlflow-safelock:locked-model:v1"


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )


class Actor(_Part):
    """Who asked for a promotion.

    Attributes:
        name: User name.
        verified: Whether MLflow's authentication vouched for it; otherwise it is only claimed.
    """

    name: str
    verified: bool


class SourceReference(_Part):
    """The fine-tune that is locked.

    Attributes:
        uri: Where its unlocked artifacts are.
        fingerprint: What they were when the lock was applied.
    """

    uri: NonEmpty
    fingerprint: SourceFingerprint


class LockReference(_Part):
    """The lock in force.

    Attributes:
        digest: Its content digest.
        base_model: The base model it was made for.
        model: Registered model it was taken from, where it was.
        version: Its version there.
    """

    digest: Digest
    base_model: NonEmpty
    model: NonEmpty | None
    version: Natural | None


OwnBiasesRule = Literal["check", "ignore"]
"""What is done about biases of a model's own: they are compared with the lock's, or left alone."""


class Promotion(_Part):
    """The decision of the gate.

    Attributes:
        model: Registered model name.
        version: Model version.
        target: What it was promoted to, such as ``stage:Staging`` or ``alias:champion``.
        policy: Digest of the policy that was in force.
        actor: Who asked.
        kinship: Cosine between the fine-tune's weights and the base's where the lock's sketch has them, -1 to
            1; ``None`` where they could not be compared.
        evaluations: Digests of the evaluations that it rests on. Of a standalone model there are none, since
            it is written before the promotion.
    """

    model: NonEmpty
    version: Natural
    target: NonEmpty
    policy: Digest
    actor: Actor
    kinship: float | None = None
    evaluations: tuple[Digest, ...] = ()

    @model_serializer(mode="wrap")
    def _without_what_is_not_stated(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As receipts were written before there were evaluations in them."""
        values: dict[str, Any] = serialize(self)
        if not self.evaluations:
            del values["evaluations"]
        return values


class ReceiptPredicate(_Part):
    """What the receipt states.

    Attributes:
        source: The fine-tune.
        lock: The lock.
        alpha: Its strength; never zero.
        carrier: How the lock is carried.
        promotion: The gate's decision; ``None`` for a locked model that somebody saved by hand.
        files: SHA-256, hexadecimal, of the locked model's own files, by path.
        shared: Files of a standalone model that are, byte for byte, files of the source: path there by path
            here. An overlay has none.
        patched: Files of a standalone model that are files of the source but for biases that the lock
            changed: their own fingerprints, the biases included.
        check: How a standalone model was confirmed before it was there, in words.
        own_biases: Whether the loader of an overlay compares the model's own biases with the lock's; not
            written down where it does, as in receipts from before this was there.
        created: When, ISO 8601 in UTC.
        tools: Versions of the software that made it.
    """

    source: SourceReference
    lock: LockReference
    alpha: float
    carrier: Literal["overlay", "standalone"]
    promotion: Promotion | None
    files: dict[str, str]
    shared: dict[str, str] = Field(default_factory=dict)
    patched: tuple[FileFingerprint, ...] = ()
    check: NonEmpty | None = None
    own_biases: OwnBiasesRule = "check"
    created: NonEmpty
    tools: dict[str, str]

    @model_serializer(mode="wrap")
    def _without_what_is_not_stated(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As receipts were written before there were these, so that those still read back the same."""
        values: dict[str, Any] = serialize(self)
        absent = {
            "patched": not self.patched,
            "check": self.check is None,
            "own_biases": self.own_biases == "check",
        }
        return {name: value for name, value in values.items() if not absent.get(name, False)}


class _Subject(_Part):
    name: NonEmpty
    digest: dict[str, str]


class Receipt(_Part):
    """An in-toto statement about one locked model; the subject is its source, by fingerprint."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: tuple[_Subject]
    predicate_type: Literal["urn:mlflow-safelock:locked-model:v1"] = Field(alias="predicateType")
    predicate: ReceiptPredicate

    def __copy__(self) -> Receipt:
        # ``model_copy`` copies by this: what was computed of this receipt is not true of a changed copy.
        copied = super().__copy__()
        copied.__dict__.pop("_canonical", None)
        return copied

    @classmethod
    def about(cls, predicate: ReceiptPredicate) -> Receipt:
        """The statement that makes ``predicate`` about the source it names."""
        digest = predicate.source.fingerprint.digest.removeprefix("sha256:")
        promotion = predicate.promotion
        name = f"models:/{promotion.model}/{promotion.version}" if promotion else predicate.source.uri
        return cls(
            type_=STATEMENT_TYPE,
            subject=(_Subject(name=name, digest={"sha256": digest}),),
            predicate_type=PREDICATE_TYPE,
            predicate=predicate,
        )

    @classmethod
    def parse(cls, data: bytes, *, origin: str) -> Receipt:
        """Read a receipt; ``origin`` names it in errors.

        Raises:
            VerificationError: It is not canonical JSON, not a receipt, or its subject is not its source.
        """
        try:
            receipt = cls.model_validate_json(data)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
                for fault in error.errors()[:3]
            )
            raise VerificationError(f"The receipt {origin} is not valid: {faults}.") from error
        if receipt.to_bytes() != data:
            raise VerificationError(f"The receipt {origin} is not canonical JSON: somebody rewrote it.")
        if receipt != cls.about(receipt.predicate):
            raise VerificationError(f"The receipt {origin} is about something else than the source it names.")
        return receipt

    def to_bytes(self) -> bytes:
        """The receipt as canonical JSON (RFC 8785)."""
        return self._canonical

    @cached_property
    def _canonical(self) -> bytes:
        return rfc8785.dumps(self.model_dump(mode="json", by_alias=True))

    @property
    def digest(self) -> str:
        """``sha256:…`` over the canonical JSON."""
        return f"sha256:{hashlib.sha256(self.to_bytes()).hexdigest()}"
