"""Where the policy comes from: the file that ``SAFELOCK_POLICY`` names, or the built-in default."""

from __future__ import annotations

from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict

from mlflow_safelock.documents import read_document
from mlflow_safelock.errors import PolicyError
from mlflow_safelock.gate.policy import DEFAULT_POLICY, Policy


class GateSettings(BaseSettings):
    """Settings of the registry's process, from environment variables.

    Attributes:
        policy: ``SAFELOCK_POLICY``, path of the policy file.
    """

    model_config = SettingsConfigDict(env_prefix="SAFELOCK_", frozen=True)

    policy: Path | None = None


def policy_in_force() -> Policy:
    """The policy of this process.

    Raises:
        PolicyError: ``SAFELOCK_POLICY`` names a file that cannot be used.
    """
    path = GateSettings().policy
    return DEFAULT_POLICY if path is None else load_policy(path)


def load_policy(path: str | Path) -> Policy:
    """Read a policy file (docs/policy.md).

    Raises:
        PolicyError: It cannot be read, or is not a valid policy; faults are named with their lines.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise PolicyError(
            f"The policy file {path} cannot be read: {error}.",
            next_step="Set SAFELOCK_POLICY to a readable file, or unset it for the default policy.",
        ) from error
    return read_document(data, f"The policy file {path}", PolicyError).parsed(Policy)
