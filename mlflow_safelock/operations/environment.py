"""The settings of this package as the environment has them, and what is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from pydantic import SecretStr

from mlflow_safelock.apply.described import described_architectures
from mlflow_safelock.errors import SafelockError
from mlflow_safelock.gate.failpoints import VARIABLE as FAILPOINT
from mlflow_safelock.operations.findings import Finding, fault_of
from mlflow_safelock.provenance import (
    Identity,
    PublicKey,
    Signatory,
    Signer,
    SigningKey,
    check_signing,
    configured_signatories,
    configured_signer,
)
from mlflow_safelock.settings import PREFIX, Settings, read_settings, variable_of

MASKED = "********"


def every_setting() -> tuple[dict[str, Any], ...]:
    """Each setting: its variable, its value, and whether that is the environment's or the default."""
    given = _given()
    return tuple(_setting(name, given) for name in Settings.model_fields)


def _given() -> dict[str, str]:
    """Variables of this package that are set; their names count in any case of the letters."""
    return {name.upper(): value for name, value in os.environ.items() if name.upper().startswith(PREFIX)}


def _setting(name: str, given: dict[str, str]) -> dict[str, Any]:
    variable, field = variable_of(name), Settings.model_fields[name]
    if variable not in given:
        default = None if field.default is None else str(field.default)
        return {"variable": variable, "value": default, "origin": "default"}
    is_secret = SecretStr in getattr(field.annotation, "__args__", (field.annotation,))
    return {
        "variable": variable,
        "value": MASKED if is_secret and given[variable] else given[variable],
        "origin": "environment",
    }


def ask_settings() -> Finding:
    """Whether the environment's settings can be used, and every one of them with its value."""
    settings = every_setting()
    facts = {"settings": list(settings)}
    try:
        read_settings()
        described_architectures()
    except SafelockError as error:
        return replace(fault_of("settings", error), facts=facts)
    strange = tuple(_strange())
    if strange:
        message, next_step = (" ".join(parts) for parts in zip(*strange, strict=True))
        return Finding("settings", "warning", message, next_step, facts)
    own = [setting["variable"] for setting in settings if setting["origin"] == "environment"]
    told = ", ".join(own) or "none"
    return Finding("settings", "ok", f"Of {len(settings)} settings the environment has {told}.", "", facts)


def _strange() -> Iterator[tuple[str, str]]:
    """Variables that look like settings, and do nothing or worse."""
    known = {variable_of(name) for name in Settings.model_fields}
    given = _given()
    unknown = sorted(given.keys() - known - {FAILPOINT})
    if FAILPOINT in given:
        yield (
            f"{FAILPOINT} is set, which is for tests: a process that reaches that place is killed.",
            "Unset it.",
        )
    for variable in unknown:
        near = get_close_matches(variable, known, n=1)
        yield (
            f"{variable} is no setting of this package, and nothing reads it.",
            f"Is {near[0]} meant?" if near else f"Unset it; the settings are {', '.join(sorted(known))}.",
        )


def ask_keys() -> Finding:
    """Whether keys and identities for receipts can be used, and go together; nothing is signed.

    Raises:
        KeyFileError: A key file cannot be used.
        SettingsError: Settings contradict each other, or are none.
        SigstoreError: Sigstore is asked for, and cannot be used.
    """
    check_signing()
    signer, accepted = configured_signer(), configured_signatories()
    facts = {
        "signs_with": _facts_of(signer),
        "accepts": None if accepted is None else [one.keyid for one in accepted],
    }
    if signer is None and accepted is None:
        return Finding("keys", "skipped", "Receipts are neither signed here nor asked to be.", "", facts)
    wanted = _in_words(accepted or ())
    if signer is None:
        return Finding("keys", "ok", f"Receipts must be signed by one of {wanted}.", "", facts)
    if accepted is not None and not _may_be_among(signer, accepted):
        how, setting = (
            ("with a key", "public_keys")
            if isinstance(signer, SigningKey)
            else ("by an identity", "identities")
        )
        return Finding(
            "keys",
            "fault",
            f"Receipts are signed here {how} that is none of those they must be signed with here.",
            f"Add its public key, or its identity, to {variable_of(setting)}.",
            facts,
        )
    also = "" if accepted is None else f", and must be signed by one of {wanted}"
    return Finding("keys", "ok", f"Receipts are signed with {_shown(signer)}{also}.", "", facts)


def _facts_of(signer: Signer | None) -> str | None:
    if signer is None:
        return None
    return signer.public.keyid if isinstance(signer, SigningKey) else "an identity"


def _shown(signer: Signer) -> str:
    return f"{signer.public.title}…" if isinstance(signer, SigningKey) else "the identity of this process"


def _may_be_among(signer: Signer, accepted: tuple[Signatory, ...]) -> bool:
    """Whether what a signer signs may be accepted; which identity this is only a token would tell."""
    if isinstance(signer, SigningKey):
        return signer.public in accepted
    return any(isinstance(one, Identity) for one in accepted)


def _in_words(accepted: tuple[Signatory, ...]) -> str:
    keys = sum(isinstance(one, PublicKey) for one in accepted)
    counts = (keys, "keys"), (len(accepted) - keys, "identities")
    return " and ".join(f"{count} {what}" for count, what in counts if count)


def ask_authentication() -> Finding:
    """Whether MLflow's authentication, where it is asked for, can be used."""
    if read_settings().auth == "none":
        return Finding("authentication", "skipped", "MLflow's authentication is not asked for here.")
    variable = variable_of("auth")
    try:
        # Imports all of it, as the server does.
        from mlflow.server.auth.config import read_auth_config
    except ImportError as error:
        return Finding(
            "authentication",
            "fault",
            f"{variable} is basic-auth, and MLflow's authentication cannot be imported: {error}.",
            "Install it: pip install 'mlflow[auth]'",
        )
    from mlflow.environment_variables import MLFLOW_AUTH_CONFIG_PATH, MLFLOW_FLASK_SERVER_SECRET_KEY

    path = MLFLOW_AUTH_CONFIG_PATH.get()
    if path and not os.access(path, os.R_OK):
        return Finding(
            "authentication",
            "fault",
            f"MLFLOW_AUTH_CONFIG_PATH names a file that cannot be read: {path}.",
            "Name MLflow's basic_auth.ini, or unset it.",
        )
    try:
        config = read_auth_config()
    except (KeyError, ValueError) as error:
        return Finding(
            "authentication",
            "fault",
            f"MLflow's authentication has a configuration that cannot be used: {error}.",
            "Correct the file that MLFLOW_AUTH_CONFIG_PATH names.",
        )
    if MLFLOW_FLASK_SERVER_SECRET_KEY.get() is None:
        return Finding(
            "authentication",
            "fault",
            "MLflow's authentication needs a key of its own that is the same in all workers.",
            "Set MLFLOW_FLASK_SERVER_SECRET_KEY to a long random text.",
        )
    if config.admin_password is None:
        return Finding(
            "authentication",
            "warning",
            "No password for MLflow's first user is set, and without one a new server does not start.",
            "Set MLFLOW_AUTH_ADMIN_PASSWORD before the first start.",
        )
    return Finding("authentication", "ok", "MLflow's authentication is asked for, and configured.")
