"""``safelock lock sign``, and what other commands do with signatures of locks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.delivery import register_lock
from mlflow_safelock.cli.options import MlflowAddress, format_option, mlflow_options
from mlflow_safelock.cli.output import announce, facts_table, show_json, show_table
from mlflow_safelock.errors import VerificationError
from mlflow_safelock.loading import fetch_mlflow_model, is_mlflow_model, load_lock_reference

if TYPE_CHECKING:
    from mlflow_safelock.lock import SafetyLock
    from mlflow_safelock.provenance import Signatory, Signer

F = TypeVar("F", bound=Callable[..., Any])


def signer_options(command: F) -> F:
    """The options ``--key`` and ``--sigstore``."""
    key = click.option(
        "--key",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="PEM",
        help="Private key to sign with: Ed25519, or ECDSA on P-256.",
    )
    sigstore = click.option(
        "--sigstore",
        is_flag=True,
        help="Sign without a key, as whoever this machine's identity token is of.",
    )
    return key(sigstore(command))


def signer_of(key: Path | None, sigstore: bool) -> Signer | None:
    """What to sign with; ``None`` where nothing is asked for.

    Raises:
        KeyFileError: The key cannot be used.
    """
    from mlflow_safelock.provenance import keyless_signer, load_signing_key

    if key is not None and sigstore:
        raise click.UsageError("Sign with --key or with --sigstore, not with both.")
    if key is not None:
        return load_signing_key(key)
    return keyless_signer() if sigstore else None


def needed_signer_of(key: Path | None, sigstore: bool) -> Signer:
    """What to sign with, where something must.

    Raises:
        KeyFileError: The key cannot be used.
    """
    signer = signer_of(key, sigstore)
    if signer is None:
        raise click.UsageError("Say what to sign with: --key PEM, or --sigstore.")
    return signer


def signatory_options(command: F) -> F:
    """The options ``--public-key`` and ``--identity``."""
    keys = click.option(
        "--public-key",
        "public_keys",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        multiple=True,
        metavar="PEM",
        help="Public key that it must be signed with; of several, one will do.",
    )
    identities = click.option(
        "--identity",
        "identities",
        type=(str, str),
        multiple=True,
        metavar="NAME ISSUER",
        help="Identity that it must be signed by, through Sigstore: a name, and the URL of the provider that "
        "vouches for it. Of several, and of keys, one will do.",
    )
    return keys(identities(command))


def signatories_of(
    public_keys: tuple[Path, ...], identities: tuple[tuple[str, str], ...]
) -> tuple[Signatory, ...]:
    """Who must have signed.

    Raises:
        KeyFileError: A key cannot be used.
    """
    from pydantic import ValidationError

    from mlflow_safelock.provenance import Identity, load_public_key

    try:
        named = [Identity(identity=name, issuer=issuer) for name, issuer in identities]
    except ValidationError as error:
        raise click.UsageError("--identity wants a name and the URL of its provider: NAME ISSUER.") from error
    return (*(load_public_key(path) for path in public_keys), *named)


@click.command(
    cls=Command,
    short_help="Sign a lock.",
    examples=(
        "safelock lock sign base.safetensors --key key.pem",
        "safelock lock sign base.safetensors --sigstore",
        "safelock lock sign models:/safelock.org--base/1 --key key.pem --tracking-uri http://mlflow:5000",
    ),
)
@click.argument("reference", metavar="PATH_OR_URI")
@signer_options
@format_option
@mlflow_options
def sign(reference: str, key: Path | None, sigstore: bool, form: str, mlflow_address: MlflowAddress) -> None:
    """Sign a lock: say that you stand behind it.

    PATH_OR_URI is a lock file, whose signature is written beside it (base.safetensors, base.dsse.json), or an
    MLflow URI such as models:/safelock.org--base/1: since nothing registered is changed, the lock is then
    registered once more, signed, as the newest version of the same model.

    A new key: openssl genpkey -algorithm ed25519 -out key.pem. Its public one, for policies and "lock
    verify": openssl pkey -in key.pem -pubout -out key.pub.pem. The password of an encrypted key is taken from
    SAFELOCK_SIGNING_KEY_PASSWORD.

    With --sigstore there is no key: the machine's identity token (or the one in the file that
    SAFELOCK_SIGSTORE_TOKEN_FILE names) says who signs, and a transparency log that it was so. That takes the
    package sigstore (pip install 'mlflow-safelock[sigstore]') and a network. The log is public.
    """
    from mlflow_safelock.provenance import sign_lock, signatory_of

    signer = needed_signer_of(key, sigstore)
    if is_mlflow_model(reference):
        announce(f"Fetching {reference}")
        mlflow_address.reach()
    found = load_lock_reference(reference)
    signature = sign_lock(found, signer)
    if is_mlflow_model(reference):
        written = register_lock(found, mlflow_address, _model_of(reference), signature)
    else:
        beside = signature_beside(Path(reference))
        beside.write_bytes(signature)
        written = str(beside)
    facts = {"signature": written, "digest": found.digest, **signatory_of(signer, signature).facts}
    if form == "json":
        show_json(facts)
    else:
        show_table(facts_table("Signed", facts.items()))


def signature_beside(path: Path) -> Path:
    """Where the signature of a lock file is."""
    return path.with_suffix(".dsse.json")


def signature_for(lock: SafetyLock, path: Path, signer: Signer | None) -> bytes | None:
    """The signature that a lock file is registered with: a new one, the one beside it, or none.

    Raises:
        SigstoreError: Sigstore cannot be used, or refuses.
        VerificationError: The one beside it is of another lock.
    """
    from mlflow_safelock.provenance import sign_lock
    from mlflow_safelock.provenance.envelopes import unverified_payload
    from mlflow_safelock.provenance.signatures import check_is_of_lock

    if signer is not None:
        return sign_lock(lock, signer)
    beside = signature_beside(path)
    if not beside.is_file():
        return None
    signature, origin = beside.read_bytes(), f"The signature {beside}"
    check_is_of_lock(unverified_payload(signature, origin=origin), lock, origin=origin)
    return signature


def check_signature(lock: SafetyLock, reference: str, signatories: tuple[Signatory, ...]) -> str:
    """Hexadecimal id of the key that signed a lock, or the identity that did.

    Raises:
        VerificationError: None of the signatories did, or there is no signature.
        SigstoreError: An identity may have, and that cannot be verified here.
    """
    from mlflow_safelock.provenance import LOCK_SIGNATURE_FILE, check_lock_signature

    if is_mlflow_model(reference):
        beside = fetch_mlflow_model(reference) / LOCK_SIGNATURE_FILE
    else:
        beside = signature_beside(Path(reference))
    if not beside.is_file():
        raise VerificationError(
            f"The lock {reference} is not signed: there is no {beside.name} beside it.",
            next_step=f"Sign it: safelock lock sign {reference} --key key.pem",
        )
    origin = f"The signature of {reference}"
    return check_lock_signature(beside.read_bytes(), lock, signatories, origin=origin).keyid


def _model_of(reference: str) -> str | None:
    """The registered model in a URI such as ``models:/name/3``; ``None`` for one of another form."""
    scheme, _, rest = reference.partition(":/")
    name, slash, _ = rest.partition("/")
    return name if scheme == "models" and slash else None
