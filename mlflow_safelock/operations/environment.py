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
from mlflow_safelock.provenance import configured_public_keys, configured_signing_key
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
    """Whether the keys for receipts can be used, and go together.

    Raises:
        KeyFileError: A key file cannot be used.
    """
    signing, public = configured_signing_key(), configured_public_keys()
    facts = {
        "signs_with": None if signing is None else signing.public.keyid,
        "accepts": None if public is None else [key.keyid for key in public],
    }
    if signing is None and public is None:
        return Finding("keys", "skipped", "Receipts are neither signed here nor asked to be.", "", facts)
    if signing is None:
        return Finding(
            "keys", "ok", f"Receipts must be signed by one of {len(public or ())} keys.", "", facts
        )
    if public is not None and signing.public.keyid not in {key.keyid for key in public}:
        return Finding(
            "keys",
            "fault",
            "Receipts are signed here with a key that is none of those they must be signed with here.",
            f"Add the public key of {variable_of('signing_key')} to {variable_of('public_keys')}.",
            facts,
        )
    also = "" if public is None else f", and must be signed by one of {len(public)} keys"
    return Finding("keys", "ok", f"Receipts are signed with {signing.public.keyid[:16]}…{also}.", "", facts)


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
