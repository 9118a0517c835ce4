"""DSSE envelopes, version 1 (github.com/secure-systems-lab/dsse): a payload, and signatures over it.

Only the envelope is made here; keys and signatures are those of ``cryptography``. What is signed is not the
JSON but an encoding in which no two payloads and types look alike, so that nothing depends on how JSON is
written, and nothing of an envelope is believed before a signature was checked.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlflow_safelock.errors import VerificationError
from mlflow_safelock.provenance.keys import PublicKey, SigningKey

IN_TOTO = "application/vnd.in-toto+json"
"""Payload type of in-toto statements, which all of our signed payloads are."""

MAX_BYTES = 32 << 20
"""Largest envelope that is read."""


class _Signature(BaseModel):
    # Other writers may add keys, which the standard has readers ignore.
    model_config = ConfigDict(frozen=True, strict=True)

    sig: str
    keyid: str = ""


class _Envelope(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    payload: str
    payload_type: str = Field(alias="payloadType")
    signatures: Annotated[list[_Signature], Field(min_length=1, max_length=64)]


def sign(payload: bytes, key: SigningKey, payload_type: str = IN_TOTO) -> bytes:
    """The envelope of a payload, signed by one key, as JSON."""
    signature = key.sign(encode(payload_type, payload))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [{"keyid": key.public.keyid, "sig": base64.b64encode(signature).decode()}],
    }
    return json.dumps(envelope, indent=2).encode() + b"\n"


def verify(
    envelope: bytes, keys: Iterable[PublicKey], *, origin: str, payload_type: str = IN_TOTO
) -> tuple[bytes, PublicKey]:
    """The payload of an envelope that one of the keys signed, and that key.

    Args:
        envelope: The envelope's JSON.
        keys: Keys of which one must have signed; what the envelope itself says of its keys is not believed.
        origin: Names the envelope in errors.
        payload_type: What the payload must be.

    Raises:
        VerificationError: It is no envelope, of another type of payload, or signed by none of the keys.
    """
    read, payload, signatures = _read(envelope, origin)
    if read.payload_type != payload_type:
        raise VerificationError(f"{origin} holds {read.payload_type[:80]!r}, and must hold {payload_type!r}.")
    signed = encode(payload_type, payload)
    trusted = tuple(keys)
    for key in trusted:
        if any(key.made(signature, signed) for signature in signatures):
            return payload, key
    wanted = ", ".join(key.keyid[:16] for key in trusted)
    raise VerificationError(
        f"{origin} is signed by none of the keys that count here ({wanted}), or what was signed was changed.",
        next_step="Have it signed by the owner of such a key, or name the right public key.",
    )


def unverified_payload(envelope: bytes, *, origin: str) -> bytes:
    """The payload of an envelope, whoever signed it: for messages, never as evidence.

    Raises:
        VerificationError: It is no envelope.
    """
    return _read(envelope, origin)[1]


def encode(payload_type: str, payload: bytes) -> bytes:
    """What is signed: the standard's pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _read(envelope: bytes, origin: str) -> tuple[_Envelope, bytes, list[bytes]]:
    if len(envelope) > MAX_BYTES:
        raise VerificationError(f"{origin} has {len(envelope)} bytes, and an envelope at most {MAX_BYTES}.")
    try:
        read = _Envelope.model_validate_json(envelope)
        signatures = [_decoded(signature.sig) for signature in read.signatures]
        return read, _decoded(read.payload), signatures
    except (ValidationError, ValueError) as error:
        raise VerificationError(f"{origin} is no DSSE envelope.") from error


def _decoded(text: str) -> bytes:
    """Base64, standard or URL-safe, as the standard has readers accept both."""
    return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
