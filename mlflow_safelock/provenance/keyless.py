"""Signatures without a key of one's own, through Sigstore: by whom an OpenID Connect provider says one is.

What is on disk is a Sigstore bundle: a DSSE envelope, the short-lived certificate of whoever signed it, and
the proof that a transparency log had it while that was valid. All of it is made and verified by the package
``sigstore`` (an extra of this one), with the trust root of the public instance, or of the one that
``SAFELOCK_SIGSTORE_TRUST_CONFIG`` describes. Signing asks the instance; verifying asks nobody.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlflow_safelock.errors import SigstoreError, UnreachableError, VerificationError
from mlflow_safelock.provenance.dsse import IN_TOTO, MAX_BYTES
from mlflow_safelock.provenance.identities import Identity
from mlflow_safelock.settings import read_settings

if TYPE_CHECKING:
    from cryptography.x509 import Certificate
    from sigstore.models import ClientTrustConfig
    from sigstore.oidc import IdentityToken
    from sigstore.verify import Verifier

T = TypeVar("T")

SIGN_SECONDS = 60
"""How long an instance may take; its client itself would wait for ever."""

_ISSUER = "1.3.6.1.4.1.57264.1.1"
"""The extension of Fulcio's certificates that names the provider."""

_MEDIA_TYPE = r"^application/vnd\.dev\.sigstore\.bundle\b"


class _Bundle(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    media_type: str = Field(alias="mediaType", pattern=_MEDIA_TYPE)
    envelope: dict[str, Any] | None = Field(alias="dsseEnvelope", default=None)


@dataclass(frozen=True)
class KeylessSigner:
    """Signs as whoever this process is.

    Attributes:
        token_file: File with an identity token, read for each signature, since they are short-lived;
            ``None``: the token that the machine has for its workloads (CI services, cloud machines).
    """

    token_file: Path | None

    def sign(self, statement: bytes) -> bytes:
        """The bundle of an in-toto statement; it is verified as readers will before it is handed out.

        Raises:
            SigstoreError: The package is not there, there is no token, or the instance refuses it.
            UnreachableError: The instance does not answer.
        """

        def signed() -> str:
            from sigstore.dsse import Statement
            from sigstore.sign import SigningContext

            context = SigningContext.from_trust_config(_trust_config(_description(), offline=False))
            with context.signer(self._token()) as signer:
                return signer.sign_dsse(Statement(statement)).to_json()

        bundle = _asked(signed).encode() + b"\n"
        verify_bundle(bundle, (identity_of(bundle),), origin="The new signature")
        return bundle

    def identity(self) -> Identity:
        """Who this process would sign as, by a certificate that the instance gives it for that.

        Raises:
            SigstoreError: The package is not there, there is no token, or the instance refuses it.
            UnreachableError: The instance does not answer.
        """

        def told() -> Identity:
            from sigstore.sign import SigningContext

            context = SigningContext.from_trust_config(_trust_config(_description(), offline=False))
            with context.signer(self._token(), cache=False) as signer:
                return _identity_in(signer._signing_cert())

        return _asked(told)

    def _token(self) -> IdentityToken:
        from sigstore.oidc import IdentityToken, detect_credential

        if self.token_file is None:
            raw = detect_credential()
        else:
            try:
                raw = self.token_file.read_text(encoding="ascii").strip()
            except (OSError, ValueError) as error:
                raise SigstoreError(
                    f"The identity token in {self.token_file} cannot be read: {error}.",
                    next_step="Correct SAFELOCK_SIGSTORE_TOKEN_FILE, or unset it for the machine's own.",
                ) from error
        if not raw:
            raise SigstoreError(
                "There is no identity token to sign with.",
                next_step="Run it where the machine has one for its workloads, such as a CI job that may ask "
                "for one, or name a file with one in SAFELOCK_SIGSTORE_TOKEN_FILE (audience: sigstore).",
            )
        return IdentityToken(raw)


def check_sigstore() -> None:
    """Refuse to go on where nothing could be verified: the package and the trust root are looked at.

    Raises:
        SigstoreError: The package is not there, or the trust root cannot be read.
    """
    _verifier()


def is_bundle(envelope: bytes) -> bool:
    """Whether a signature file is a Sigstore bundle, as far as it says."""
    try:
        _Bundle.model_validate_json(envelope)
    except ValidationError:
        return False
    return True


def envelope_in(bundle: bytes) -> bytes:
    """The DSSE envelope in a bundle, whoever signed it."""
    return json.dumps(_Bundle.model_validate_json(bundle).envelope).encode()


def verify_bundle(bundle: bytes, identities: Sequence[Identity], *, origin: str) -> tuple[bytes, Identity]:
    """The payload of a bundle that one of the identities signed, and that identity.

    Args:
        bundle: The bundle's JSON.
        identities: Identities of which one must have signed.
        origin: Names the bundle in errors.

    Raises:
        VerificationError: None of them did, or something in it does not hold: signature, certificate, the
            log's promise and proof.
        SigstoreError: Nothing can be verified here.
    """
    if len(bundle) > MAX_BYTES:
        raise VerificationError(f"{origin} has {len(bundle)} bytes, and a bundle at most {MAX_BYTES}.")
    verifier, wanted = _verifier(), _OneOf(identities)
    try:
        from sigstore.models import Bundle

        kind, payload = verifier.verify_dsse(Bundle.from_json(bundle), wanted)
    except Exception as error:  # what is malformed fails in many ways
        names = ", ".join(identity.title for identity in identities)
        raise VerificationError(
            f"{origin} is signed by none of the identities that count here ({names}), or does not hold: "
            f"{_clipped(error)}",
            next_step="Have it signed by such an identity, or look whether the trust root is that of the "
            "instance that it was signed through (SAFELOCK_SIGSTORE_TRUST_CONFIG).",
        ) from error
    if kind != IN_TOTO or wanted.found is None:
        raise VerificationError(f"{origin} holds {kind[:80]!r}, and must hold {IN_TOTO!r}.")
    return payload, wanted.found


def identity_of(bundle: bytes) -> Identity:
    """Whom the certificate in a bundle names; never evidence before the bundle was verified.

    Raises:
        VerificationError: It names nobody.
        SigstoreError: The package is not there.
    """
    _installed()
    try:
        from sigstore.models import Bundle

        return _identity_in(Bundle.from_json(bundle).signing_certificate)
    except Exception as error:  # what is malformed fails in many ways
        raise VerificationError(f"The bundle names nobody who signed it: {_clipped(error)}") from error


class _OneOf:
    """The policy that ``sigstore`` asks whether a certificate, which it has verified, is of who is wanted."""

    def __init__(self, identities: Sequence[Identity]) -> None:
        self.identities = identities
        self.found: Identity | None = None

    def verify(self, cert: Certificate) -> None:
        from sigstore.errors import VerificationError as NotVerified
        from sigstore.verify import policy

        for wanted in self.identities:
            try:
                policy.Identity(identity=wanted.identity, issuer=wanted.issuer).verify(cert)
            except NotVerified:
                continue
            self.found = wanted
            return
        raise NotVerified(f"it is signed by {_identity_in(cert)}")


def _identity_in(certificate: Certificate) -> Identity:
    from cryptography import x509

    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    name = next(iter(names))
    raw = name.value.decode() if isinstance(name, x509.OtherName) else name.value
    issuer = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier(_ISSUER)).value
    return Identity(identity=raw, issuer=issuer.value.decode())  # type: ignore[attr-defined]


def _asked(ask: Callable[[], T]) -> T:
    """Ask the instance for something, for no longer than it may take.

    Raises:
        SigstoreError: The package is not there, or it cannot be done.
        UnreachableError: There was no answer in time.
    """
    _installed()
    done: list[T | Exception] = []

    def work() -> None:
        try:
            done.append(ask())
        except Exception as error:  # noqa: BLE001 - it is raised below, in the thread of who asks
            done.append(error)

    thread = threading.Thread(target=work, name="safelock-sigstore", daemon=True)
    thread.start()
    thread.join(SIGN_SECONDS)
    if not done:
        raise UnreachableError(
            f"The Sigstore instance did not answer within {SIGN_SECONDS} seconds, so nothing was signed."
        )
    (outcome,) = done
    if isinstance(outcome, SigstoreError):
        raise outcome
    if isinstance(outcome, Exception):
        # Where it is that a service does not answer, that is among the causes, and told by them.
        raise SigstoreError(
            f"Nothing could be signed through Sigstore: {_clipped(outcome)}",
            next_step="Look whether the identity token is valid now, and the instance can be reached.",
        ) from outcome
    return outcome


def _clipped(error: BaseException) -> str:
    """What an error says, or the one that it came from, in one line: parts of it may be anybody's."""
    now: BaseException | None = error
    while now is not None:
        if text := " ".join(str(now).split()):
            return f"{text[:300].rstrip('.')}."
        now = now.__cause__
    return f"{type(error).__name__}."


def _installed() -> None:
    """Refuse to go on without the package.

    Raises:
        SigstoreError: It is not installed, or not whole.
    """
    try:
        import sigstore.models  # noqa: F401
    except ImportError as error:
        raise SigstoreError(
            f"Signatures by identity need the package sigstore, which cannot be imported: {error}.",
            next_step="Install it: pip install 'mlflow-safelock[sigstore]'",
        ) from error


def _verifier() -> Verifier:
    _installed()
    return _verifier_for(_description())


@lru_cache(maxsize=4)
def _verifier_for(description: str | None) -> Verifier:
    from sigstore.verify import Verifier

    trusted = _trust_config(description, offline=True)
    return _read(description, lambda: Verifier(trusted_root=trusted.trusted_root))


def _trust_config(description: str | None, *, offline: bool) -> ClientTrustConfig:
    """The instance with this description, or the public one.

    Args:
        description: JSON of a ``ClientTrustConfig``; ``None``: the public instance.
        offline: Whether the public one's is the one that came with the package, or was fetched last.

    Raises:
        SigstoreError: It cannot be read.
    """
    _installed()
    from sigstore.models import ClientTrustConfig

    if description is None:
        return _read(None, lambda: ClientTrustConfig.production(offline=offline))
    return _read(description, lambda: ClientTrustConfig.from_json(description))


def _read(description: str | None, read: Callable[[], T]) -> T:
    try:
        return read()
    except Exception as error:  # what is malformed fails in many ways
        which, look = (
            ("of the public instance", "Look whether this machine can reach it, or name")
            if description is None
            else ("in SAFELOCK_SIGSTORE_TRUST_CONFIG", "Name")
        )
        raise SigstoreError(
            f"Sigstore's trust configuration {which} cannot be used: {_clipped(error)}",
            next_step=f"{look} a file with the ClientTrustConfig of another instance in "
            "SAFELOCK_SIGSTORE_TRUST_CONFIG.",
        ) from error


def _description() -> str | None:
    """The instance that is described to this process, as JSON; ``None``: the public one."""
    path = read_settings().sigstore_trust_config
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SigstoreError(
            f"Sigstore's trust configuration {path} cannot be read: {error}.",
            next_step="Correct or unset SAFELOCK_SIGSTORE_TRUST_CONFIG.",
        ) from error
