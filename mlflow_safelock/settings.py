"""Every setting of this package that comes from the environment, in one place."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from mlflow_safelock.errors import SettingsError

PREFIX = "SAFELOCK_"


class Settings(BaseSettings):
    """What the environment says.

    Attributes:
        policy: ``SAFELOCK_POLICY``, path of the policy file; the built-in policy where not set.
        architectures: ``SAFELOCK_ARCHITECTURES``, path of a file that describes architectures.
        signing_key: ``SAFELOCK_SIGNING_KEY``, path of the private key that receipts are signed with.
        signing_key_password: ``SAFELOCK_SIGNING_KEY_PASSWORD``, where that file is encrypted.
        public_keys: ``SAFELOCK_PUBLIC_KEYS``, paths of public keys with the system's separator (``:``)
            between them; where it is set, a receipt must be signed by one of them.
        identities: ``SAFELOCK_IDENTITIES``, a JSON list of identities as in a policy; where it, or the one
            before, is set, a receipt must be signed by one of either.
        sigstore_signing: ``SAFELOCK_SIGSTORE_SIGNING``, whether receipts are signed through Sigstore, with no
            key, as whoever the process is.
        sigstore_token_file: ``SAFELOCK_SIGSTORE_TOKEN_FILE``, path of an identity token that says who that
            is; the one that the machine has for its workloads where not set.
        sigstore_trust_config: ``SAFELOCK_SIGSTORE_TRUST_CONFIG``, path of the ``ClientTrustConfig`` of a
            Sigstore instance; the public one where not set.
        ledger: ``SAFELOCK_LEDGER``, database of the ledger where the registry is a server's
            (``safelock+http://``); a sqlite file in the home directory where not set.
        webhook_secret: ``SAFELOCK_WEBHOOK_SECRET``, the secret of the webhook that a watcher listens to.
        auth: ``SAFELOCK_AUTH``, ``basic-auth`` to have MLflow's own authentication in front of the server.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    policy: Path | None = None
    architectures: Path | None = None
    signing_key: Path | None = None
    signing_key_password: SecretStr | None = None
    public_keys: str | None = None
    identities: str | None = None
    sigstore_signing: bool = False
    sigstore_token_file: Path | None = None
    sigstore_trust_config: Path | None = None
    ledger: SecretStr | None = None
    webhook_secret: SecretStr | None = None
    auth: Literal["none", "basic-auth"] = "none"

    @field_validator("architectures", "ledger", "webhook_secret", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return value or None


def read_settings() -> Settings:
    """The settings as the environment has them now; read anew only when it changed.

    Raises:
        SettingsError: One is not valid; the message names it, and not its value.
    """
    # Every lock, promotion and load asks, and each time would cost a quarter of a millisecond.
    names = [name for name in os.environ if name[: len(PREFIX)].upper() == PREFIX]
    return _settings_of(tuple((name, os.environ.get(name)) for name in names))


@lru_cache(maxsize=4)
def _settings_of(_environment: tuple[tuple[str, str | None], ...]) -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        faults = "; ".join(
            f"{variable_of(str(fault['loc'][0]))}: {fault['msg']}"
            for fault in error.errors(include_url=False, include_input=False)
        )
        raise SettingsError(
            f"The environment has settings that cannot be used: {faults}.",
            next_step="Correct or unset them.",
        ) from error


def variable_of(field: str) -> str:
    """The environment variable of a setting."""
    return f"{PREFIX}{field.upper()}"
