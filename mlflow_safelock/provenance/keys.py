"""Keys in PEM files: Ed25519, and ECDSA on P-256 with SHA-256.

``openssl genpkey -algorithm ed25519 -out key.pem`` makes a private one, and its public one is made by
``openssl pkey -in key.pem -pubout -out key.pub.pem``.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from mlflow_safelock.errors import KeyFileError
from mlflow_safelock.settings import read_settings

MAX_KEY_BYTES = 1 << 16
"""Largest key file that is read."""

_ECDSA = ec.ECDSA(hashes.SHA256())
_KINDS = "Keys are Ed25519 or ECDSA on P-256, in PEM: openssl genpkey -algorithm ed25519 -out key.pem"


@dataclass(frozen=True)
class PublicKey:
    """A key that signatures are checked with.

    Attributes:
        pem: The key as PEM, in the one form that ``openssl pkey -pubout`` writes.
    """

    pem: str

    @classmethod
    def parse(cls, data: bytes, *, origin: str) -> PublicKey:
        """Read a public key; ``origin`` names it in errors.

        Raises:
            KeyFileError: It is none, or one of another kind.
        """
        try:
            key = serialization.load_pem_public_key(data)
        except (ValueError, UnsupportedAlgorithm) as error:
            what = "a private key, and must be a public one" if b"PRIVATE" in data else "no public key in PEM"
            raise KeyFileError(
                f"{origin} is {what}.",
                next_step="Write the public one: openssl pkey -in key.pem -pubout -out key.pub.pem",
            ) from error
        return cls(_public_pem(_of_known_kind(key, origin)))

    @property
    def keyid(self) -> str:
        """Hexadecimal SHA-256 of the key's DER form: what ``openssl pkey -pubin -outform DER`` writes."""
        return hashlib.sha256(
            self._key.public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        ).hexdigest()

    @property
    def title(self) -> str:
        """What to call it in a sentence: the beginning of its id."""
        return self.keyid[:16]

    @property
    def facts(self) -> dict[str, str]:
        """What to tell programs of it."""
        return {"key": self.keyid}

    def made(self, signature: bytes, data: bytes) -> bool:
        """Whether this key's private one signed ``data``."""
        key = self._key
        try:
            if isinstance(key, ed25519.Ed25519PublicKey):
                key.verify(signature, data)
            else:
                key.verify(signature, data, _ECDSA)
        except InvalidSignature:
            return False
        return True

    @property
    def _key(self) -> ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey:
        return _of_known_kind(serialization.load_pem_public_key(self.pem.encode()), "The key")


@dataclass(frozen=True)
class SigningKey:
    """A private key; it never shows itself."""

    _key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey

    def __repr__(self) -> str:
        return f"SigningKey({self.public.keyid})"

    @classmethod
    def parse(cls, data: bytes, *, origin: str, password: bytes | None = None) -> SigningKey:
        """Read a private key; ``origin`` names it in errors.

        Raises:
            KeyFileError: It is none, one of another kind, or encrypted with another password.
        """
        try:
            key = serialization.load_pem_private_key(data, password)
        except TypeError as error:
            raise KeyFileError(
                f"{origin} is encrypted, or a password was given and it is not.",
                next_step="Set SAFELOCK_SIGNING_KEY_PASSWORD to its password, or unset it.",
            ) from error
        except (ValueError, UnsupportedAlgorithm) as error:
            raise KeyFileError(
                f"{origin} is no private key in PEM that can be read, or its password is another.",
                next_step=_KINDS,
            ) from error
        if not isinstance(key, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
            raise KeyFileError(f"{origin} is a key of another kind.", next_step=_KINDS)
        _of_known_kind(key.public_key(), origin)
        return cls(key)

    def sign(self, data: bytes) -> bytes:
        """The signature of ``data``."""
        if isinstance(self._key, ed25519.Ed25519PrivateKey):
            return self._key.sign(data)
        return self._key.sign(data, _ECDSA)

    @property
    def public(self) -> PublicKey:
        """The public key that belongs to it."""
        return PublicKey(_public_pem(self._key.public_key()))


def load_public_key(path: str | Path) -> PublicKey:
    """Read a public key file.

    Raises:
        KeyFileError: It cannot be read, or holds no public key of a known kind.
    """
    return PublicKey.parse(_read(path), origin=f"The key file {path}")


def load_signing_key(path: str | Path) -> SigningKey:
    """Read a private key file; ``SAFELOCK_SIGNING_KEY_PASSWORD`` is the password of an encrypted one.

    Raises:
        KeyFileError: It cannot be read, or holds no private key of a known kind.
    """
    secret = read_settings().signing_key_password
    password = secret.get_secret_value().encode() if secret is not None else None
    return SigningKey.parse(_read(path), origin=f"The key file {path}", password=password)


def configured_signing_key() -> SigningKey | None:
    """The key that ``SAFELOCK_SIGNING_KEY`` names.

    Raises:
        KeyFileError: It names a file that cannot be used.
    """
    path = read_settings().signing_key
    return None if path is None else load_signing_key(path)


def configured_public_keys() -> tuple[PublicKey, ...] | None:
    """The keys that ``SAFELOCK_PUBLIC_KEYS`` names; ``None`` where it is not set.

    Raises:
        KeyFileError: It names none, or a file that cannot be used.
    """
    paths = read_settings().public_keys
    if paths is None:
        return None
    keys = tuple(load_public_key(path) for path in paths.split(os.pathsep) if path)
    if not keys:
        raise KeyFileError(
            "SAFELOCK_PUBLIC_KEYS is set and names no key.",
            next_step="Name a public key file, or unset it, so that signatures are not looked at.",
        )
    return keys


def _read(path: str | Path) -> bytes:
    try:
        with Path(path).open("rb") as stream:
            return stream.read(MAX_KEY_BYTES)
    except (OSError, ValueError) as error:  # no path has a zero in it, which Python has that error for
        raise KeyFileError(f"The key file {path} cannot be read: {error}.") from error


def _of_known_kind(key: object, origin: str) -> ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey:
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise KeyFileError(f"{origin} is a key of another kind.", next_step=_KINDS)


def _public_pem(key: ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form).decode()
