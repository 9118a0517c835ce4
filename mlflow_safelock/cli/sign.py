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

F = TypeVar("F", bound=Callable[..., Any])


def key_option(*, required: bool) -> Callable[[F], F]:
    """The option ``--key``."""
    return click.option(
        "--key",
        required=required,
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="PEM",
        help="Private key to sign with: Ed25519, or ECDSA on P-256.",
    )


public_key_option = click.option(
    "--public-key",
    "public_keys",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    metavar="PEM",
    help="Public key that it must be signed with; of several, one will do.",
)


@click.command(
    cls=Command,
    short_help="Sign a lock.",
    examples=(
        "safelock lock sign base.safetensors --key key.pem",
        "safelock lock sign models:/safelock.org--base/1 --key key.pem --tracking-uri http://mlflow:5000",
    ),
)
@click.argument("reference", metavar="PATH_OR_URI")
@key_option(required=True)
@format_option
@mlflow_options
def sign(reference: str, key: Path, form: str, mlflow_address: MlflowAddress) -> None:
    """Sign a lock: say that you stand behind it.

    PATH_OR_URI is a lock file, whose signature is written beside it (base.safetensors, base.dsse.json), or an
    MLflow URI such as models:/safelock.org--base/1: since nothing registered is changed, the lock is then
    registered once more, signed, as the newest version of the same model.

    A new key: openssl genpkey -algorithm ed25519 -out key.pem. Its public one, for policies and "lock
    verify": openssl pkey -in key.pem -pubout -out key.pub.pem. The password of an encrypted key is taken from
    SAFELOCK_SIGNING_KEY_PASSWORD.
    """
    from mlflow_safelock.provenance import load_signing_key, sign_lock

    private = load_signing_key(key)
    if is_mlflow_model(reference):
        announce(f"Fetching {reference}")
        mlflow_address.reach()
    found = load_lock_reference(reference)
    signature = sign_lock(found, private)
    if is_mlflow_model(reference):
        written = register_lock(found, mlflow_address, _model_of(reference), signature)
    else:
        beside = signature_beside(Path(reference))
        beside.write_bytes(signature)
        written = str(beside)
    facts = {"signature": written, "digest": found.digest, "key": private.public.keyid}
    if form == "json":
        show_json(facts)
    else:
        show_table(facts_table("Signed", facts.items()))


def signature_beside(path: Path) -> Path:
    """Where the signature of a lock file is."""
    return path.with_suffix(".dsse.json")


def signature_for(lock: SafetyLock, path: Path, key: Path | None) -> bytes | None:
    """The signature that a lock file is registered with: a new one, the one beside it, or none.

    Raises:
        KeyFileError: The key cannot be used.
        VerificationError: The one beside it is of another lock.
    """
    from mlflow_safelock.provenance import load_signing_key, sign_lock
    from mlflow_safelock.provenance.dsse import unverified_payload
    from mlflow_safelock.provenance.signatures import check_is_of_lock

    if key is not None:
        return sign_lock(lock, load_signing_key(key))
    beside = signature_beside(path)
    if not beside.is_file():
        return None
    signature, origin = beside.read_bytes(), f"The signature {beside}"
    check_is_of_lock(unverified_payload(signature, origin=origin), lock, origin=origin)
    return signature


def check_signature(lock: SafetyLock, reference: str, public_keys: tuple[Path, ...]) -> str:
    """Hexadecimal id of the key that signed a lock.

    Raises:
        VerificationError: None of the keys did, or there is no signature.
        KeyFileError: A key cannot be used.
    """
    from mlflow_safelock.provenance import LOCK_SIGNATURE_FILE, check_lock_signature, load_public_key

    keys = [load_public_key(path) for path in public_keys]
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
    return check_lock_signature(beside.read_bytes(), lock, keys, origin=origin).keyid


def _model_of(reference: str) -> str | None:
    """The registered model in a URI such as ``models:/name/3``; ``None`` for one of another form."""
    scheme, _, rest = reference.partition(":/")
    name, slash, _ = rest.partition("/")
    return name if scheme == "models" and slash else None
