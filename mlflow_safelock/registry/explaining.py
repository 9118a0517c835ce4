"""Explaining a promotion against a real registry, without writing to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from mlflow_safelock.gate import ledger
from mlflow_safelock.gate.approval import Request
from mlflow_safelock.gate.explanation import Explanation, explain
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.policy import Policy
from mlflow_safelock.gate.ports import Target
from mlflow_safelock.gate.promotion import Gate
from mlflow_safelock.registry.actor import current_actor
from mlflow_safelock.registry.artifacts import RegistryArtifacts
from mlflow_safelock.registry.sql import SqlRegistry
from mlflow_safelock.registry.stores import SafelockStore, SafelockWorkspaceStore, connect


@dataclass(frozen=True)
class RegistryWithoutLedger(SqlRegistry):
    """A registry that had no gate yet, so that nothing was decided in it."""

    def promotion_at(self, location: str) -> LedgerEntry | None:
        """None."""

    def decision_on(self, workspace: str, name: str, version: int) -> LedgerEntry | None:
        """None."""

    def revocation_of(self, digest: str) -> LedgerEntry | None:
        """None."""

    def locks_of(self, workspace: str, base: str) -> Sequence[LedgerEntry]:
        """None."""
        return ()

    def known_lock(
        self, workspace: str, name: str, version: int, digest: str | None = None
    ) -> LedgerEntry | None:
        """None."""

    def ledger_identity(self) -> str:
        """That of one without rows."""
        return ledger.GENESIS

    def writing_of(self, location: str) -> LedgerEntry | None:
        """None."""

    def preparation_of(self, original: str) -> LedgerEntry | None:
        """None."""

    def evaluations_of(self, original: str) -> Sequence[LedgerEntry]:
        """None."""
        return ()


def explain_promotion(
    registry_uri: str, tracking_uri: str | None, policy: Policy, name: str, version: int, target: Target
) -> Explanation:
    """What a promotion would do under a policy, which need not be the one in force.

    Args:
        registry_uri: The registry's database, with or without the prefix ``safelock+``.
        tracking_uri: Where logged models and runs are looked up.
        policy: The policy.
        name: Registered model.
        version: Its version.
        target: Where it would be promoted to.

    Raises:
        mlflow.exceptions.MlflowException: There is no such version.
    """
    store = connect(registry_uri)
    gate = reading_gate(store, tracking_uri, policy)
    name = gate.registry.registered_name(name)
    return explain(gate, Request(name, version, target, current_actor(), store._workspace))


def reading_gate(
    store: SafelockStore | SafelockWorkspaceStore, tracking_uri: str | None, policy: Policy
) -> Gate:
    """A gate that is asked what it would do, on a registry that may have no ledger yet."""
    has_ledger = sa.inspect(store.engine).has_table(ledger.TABLE.name)
    registry = SqlRegistry(store) if has_ledger else RegistryWithoutLedger(store)
    return Gate(lambda: policy, registry, RegistryArtifacts(tracking_uri))
