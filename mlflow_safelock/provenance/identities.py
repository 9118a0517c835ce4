"""Identities that may sign: who, and which OpenID Connect provider says so."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mlflow_safelock.errors import SettingsError
from mlflow_safelock.lock import NonEmpty
from mlflow_safelock.settings import read_settings


class Identity(BaseModel):
    """Somebody, or some workload, that an OpenID Connect provider vouches for.

    Attributes:
        identity: The name in the certificates that Sigstore gives it: an e-mail address, or a URI.
        issuer: The provider's URL. Two providers may vouch for the same name, and mean two.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    identity: NonEmpty
    issuer: Annotated[str, Field(pattern=r"^https?://\S+$")]

    def __str__(self) -> str:
        return f"{self.identity} of {self.issuer}"

    @property
    def keyid(self) -> str:
        """What it goes by where a key goes by its digest."""
        return str(self)

    @property
    def title(self) -> str:
        """What to call it in a sentence."""
        return str(self)

    @property
    def facts(self) -> dict[str, str]:
        """What to tell programs of it."""
        return {"identity": self.identity, "issuer": self.issuer}


_LIST = TypeAdapter(Annotated[tuple[Identity, ...], Field(min_length=1)])


def configured_identities() -> tuple[Identity, ...] | None:
    """The identities that ``SAFELOCK_IDENTITIES`` names; ``None`` where it is not set.

    Raises:
        SettingsError: It is no list of identities, or an empty one.
    """
    text = read_settings().identities
    if text is None:
        return None
    try:
        return _LIST.validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise SettingsError(
            f"SAFELOCK_IDENTITIES is set and cannot be used: {fault}.",
            next_step='Write it as in a policy, in JSON: [{"identity": "…", "issuer": "https://…"}].',
        ) from error
