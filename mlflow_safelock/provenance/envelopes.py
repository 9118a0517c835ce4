"""Signature files of either kind: by a key in a file, or by an identity, through Sigstore.

Whatever is signed here goes through ``seal``, and whatever is believed of a signature through ``opened``.
"""

from __future__ import annotations

from collections.abc import Iterable

from mlflow_safelock.errors import SettingsError, VerificationError
from mlflow_safelock.provenance import dsse
from mlflow_safelock.provenance.identities import Identity, configured_identities
from mlflow_safelock.provenance.keyless import (
    KeylessSigner,
    check_sigstore,
    envelope_in,
    identity_of,
    is_bundle,
    verify_bundle,
)
from mlflow_safelock.provenance.keys import (
    PublicKey,
    SigningKey,
    configured_public_keys,
    configured_signing_key,
)
from mlflow_safelock.settings import read_settings

Signer = SigningKey | KeylessSigner
"""What signs."""

Signatory = PublicKey | Identity
"""Who may have signed."""


def seal(statement: bytes, signer: Signer) -> bytes:
    """The signature file of an in-toto statement: a DSSE envelope, or a Sigstore bundle around one.

    Raises:
        SigstoreError: It is to be signed by an identity, and Sigstore cannot be used or refuses.
        UnreachableError: Sigstore does not answer.
    """
    return dsse.sign(statement, signer) if isinstance(signer, SigningKey) else signer.sign(statement)


def opened(envelope: bytes, signatories: Iterable[Signatory], *, origin: str) -> tuple[bytes, Signatory]:
    """The statement in a signature file that one of the signatories signed, and that one.

    Args:
        envelope: The file.
        signatories: Keys and identities of which one must have signed.
        origin: Names the file in errors.

    Raises:
        VerificationError: It is no signature file, or signed by none of them.
        SigstoreError: One of the identities may have signed it, and that cannot be verified here.
    """
    trusted = tuple(signatories)
    keys = [one for one in trusted if isinstance(one, PublicKey)]
    identities = [one for one in trusted if isinstance(one, Identity)]
    if is_bundle(envelope):
        if not identities:
            raise VerificationError(f"{origin} is signed by an identity, and only keys count here.")
        return verify_bundle(envelope, identities, origin=origin)
    if identities and not keys:
        raise VerificationError(f"{origin} is no Sigstore bundle, and only identities count here.")
    return dsse.verify(envelope, keys, origin=origin)


def unverified_payload(envelope: bytes, *, origin: str) -> bytes:
    """The statement in a signature file, whoever signed it: for messages, never as evidence.

    Raises:
        VerificationError: It is no signature file.
    """
    return dsse.unverified_payload(envelope_in(envelope) if is_bundle(envelope) else envelope, origin=origin)


def signatory_of(signer: Signer, envelope: bytes) -> Signatory:
    """Who a file is signed by that a signer has just made."""
    return signer.public if isinstance(signer, SigningKey) else identity_of(envelope)


def is_sealed_by(envelope: bytes, statement: bytes, signer: Signer) -> bool:
    """Whether a signature file is of this statement, and one that the signer may have made.

    Of an identity that is told by ``SAFELOCK_IDENTITIES``; where nobody is named there, any will do.
    """
    try:
        if isinstance(signer, SigningKey):
            wanted: tuple[Signatory, ...] = (signer.public,)
        else:
            wanted = configured_identities() or (identity_of(envelope),)
        return opened(envelope, wanted, origin="The signature")[0] == statement
    except VerificationError:
        return False


def configured_signer() -> Signer | None:
    """What receipts and evaluations are signed with in this process; ``None`` where they are not.

    Raises:
        KeyFileError: ``SAFELOCK_SIGNING_KEY`` names a file that cannot be used.
        SettingsError: The environment names both a key and Sigstore.
    """
    settings, key = read_settings(), configured_signing_key()
    if not settings.sigstore_signing:
        return key
    if key is not None:
        raise SettingsError(
            "SAFELOCK_SIGNING_KEY names a key, and SAFELOCK_SIGSTORE_SIGNING has things signed without one.",
            next_step="Unset one of them.",
        )
    return keyless_signer()


def keyless_signer() -> KeylessSigner:
    """What signs as whoever this process is."""
    return KeylessSigner(read_settings().sigstore_token_file)


def configured_signatories() -> tuple[Signatory, ...] | None:
    """Who must have signed receipts that are read in this process; ``None`` where nobody asks.

    Raises:
        KeyFileError: ``SAFELOCK_PUBLIC_KEYS`` names none, or a file that cannot be used.
        SettingsError: ``SAFELOCK_IDENTITIES`` cannot be used.
    """
    keys, identities = configured_public_keys(), configured_identities()
    if keys is None and identities is None:
        return None
    return (*(keys or ()), *(identities or ()))


def check_signing() -> None:
    """Refuse settings that cannot be used to sign, or to tell which identity did; no service is asked.

    Raises:
        KeyFileError: The key to sign with cannot be used.
        SettingsError: Settings contradict each other, or are none.
        SigstoreError: They ask for Sigstore, which cannot be used.
    """
    if isinstance(configured_signer(), KeylessSigner) or configured_identities() is not None:
        check_sigstore()
