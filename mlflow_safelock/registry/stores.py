"""MLflow's SQL registry stores with the gate in front of promotions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.entities.model_registry.model_version_stages import get_canonical_stage
from mlflow.environment_variables import MLFLOW_ENABLE_WORKSPACES
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    RESOURCE_CONFLICT,
)
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
from mlflow.store.model_registry.sqlalchemy_workspace_store import WorkspaceAwareSqlAlchemyStore

from mlflow_safelock.apply.checkpoint.progress import Progress, silent
from mlflow_safelock.errors import PromotionRefused
from mlflow_safelock.gate.ledger import create_table
from mlflow_safelock.gate.policy import Policy
from mlflow_safelock.gate.policy_file import policy_in_force
from mlflow_safelock.gate.ports import Target
from mlflow_safelock.gate.promotion import Gate, Preparation, Request
from mlflow_safelock.registry.actor import current_actor
from mlflow_safelock.registry.artifacts import RegistryArtifacts
from mlflow_safelock.registry.sql import SqlRegistry

_logger = logging.getLogger(__name__)

SCHEME_PREFIX = "safelock+"

ERROR_CODES = {
    "conflict": RESOURCE_CONFLICT,
    "geometry_mismatch": RESOURCE_CONFLICT,
    "already_locked": RESOURCE_CONFLICT,
    "damaged_lock": INVALID_PARAMETER_VALUE,
    "unreadable": INVALID_PARAMETER_VALUE,
}
"""MLflow error codes by reason; all others are PERMISSION_DENIED. All are 4xx: MLflow's client repeats a 5xx
for minutes and loses its message."""


class GateMixin:
    """Puts the gate in front of a store's two ways to promote a version; the store class comes after it."""

    _gate: Gate

    def transition_model_version_stage(
        self, name: str, version: Any, stage: str, archive_existing_versions: bool
    ) -> ModelVersion:
        """MLflow's own transition, once the gate has locked the version or found nothing to do."""
        self._pass_gate(name, version, Target("stage", get_canonical_stage(stage)))
        return super().transition_model_version_stage(  # type: ignore[misc]
            name, version, stage, archive_existing_versions
        )

    def set_registered_model_alias(self, name: str, alias: str, version: Any) -> None:
        """MLflow's own alias, once the gate has locked the version or found nothing to do."""
        self._pass_gate(name, version, Target("alias", alias))
        super().set_registered_model_alias(name, alias, version)  # type: ignore[misc]

    def prepare(self, name: str, version: int, progress: Progress = silent) -> Preparation:
        """Write ahead what the version's promotion needs; see ``Gate.prepare``.

        Args:
            name: Registered model.
            version: Its version.
            progress: Is told how many bytes were moved, and of how many.

        Raises:
            PromotionRefused: The version could not be promoted as it is.
            MlflowException: There is no such version.
        """
        workspace = self._get_active_workspace()  # type: ignore[attr-defined]
        target = Target("prepare", "standalone")
        return self._gate.prepare(Request(name, version, target, current_actor(), workspace), progress)

    def _pass_gate(self, name: str, version: Any, target: Target) -> None:
        try:
            number = int(version)
        except (TypeError, ValueError):
            return  # MLflow refuses it next, in its own words
        workspace = self._get_active_workspace()  # type: ignore[attr-defined]
        try:
            self._gate.promote(Request(name, number, target, current_actor(), workspace))
        except PromotionRefused as refusal:
            raise MlflowException(
                f"safelock refused to promote {name!r} version {number} to {target} [{refusal.reason}]. "
                f"{refusal}",
                ERROR_CODES.get(refusal.reason, PERMISSION_DENIED),
            ) from refusal
        except MlflowException:
            raise
        except Exception as error:
            _logger.exception("safelock failed to promote %r version %s to %s", name, number, target)
            raise MlflowException(
                f"safelock could not promote {name!r} version {number} to {target} [failed]. {error} "
                "Nothing was promoted. The server's log has the details.",
                RESOURCE_CONFLICT,
            ) from error


class SafelockStore(GateMixin, SqlAlchemyStore):  # type: ignore[misc]
    """MLflow's SQL registry store, gated."""


class SafelockWorkspaceStore(GateMixin, WorkspaceAwareSqlAlchemyStore):  # type: ignore[misc]
    """MLflow's SQL registry store for servers with workspaces, gated."""


def open_store(store_uri: str, tracking_uri: str | None) -> SafelockStore | SafelockWorkspaceStore:
    """Open the gated store for a ``safelock+…`` URI.

    Raises:
        PolicyError: The policy file cannot be used.
    """
    policy = policy_in_force()
    store_class = SafelockWorkspaceStore if MLFLOW_ENABLE_WORKSPACES.get() else SafelockStore
    store = store_class(store_uri.removeprefix(SCHEME_PREFIX))
    create_table(store.engine)
    store._gate = Gate(_always(policy), SqlRegistry(store), RegistryArtifacts(tracking_uri))
    _logger.info("safelock guards this registry: %s, policy %s", store_class.__name__, policy.digest)
    return store


def _always(policy: Policy) -> Callable[[], Policy]:
    return lambda: policy
