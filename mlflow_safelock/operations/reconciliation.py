"""One pass over a registry: every version that came past the gate, and what is done about it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import sqlalchemy as sa
from mlflow.environment_variables import MLFLOW_ENABLE_WORKSPACES
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.utils.workspace_context import WorkspaceContext

from mlflow_safelock.audit.database import database_rows, open_database
from mlflow_safelock.audit.report import wanted
from mlflow_safelock.audit.rows import AuditRow
from mlflow_safelock.errors import LedgerError
from mlflow_safelock.gate import leases, ledger
from mlflow_safelock.gate.explanation import Refusal
from mlflow_safelock.gate.guard import Guard
from mlflow_safelock.gate.policy import Policy
from mlflow_safelock.gate.ports import Target
from mlflow_safelock.gate.reconciling import Difference, Reconciling, Repair, Way
from mlflow_safelock.operations.sweeping import Sweeping
from mlflow_safelock.registry.actor import current_actor
from mlflow_safelock.registry.explaining import reading_gate
from mlflow_safelock.registry.rest import ClientsLedger, LedgerDatabase
from mlflow_safelock.registry.stores import SafelockStore, SafelockWorkspaceStore, connect

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reconciliation:
    """Passes over one registry.

    Attributes:
        registry_uri: Its database.
        policy: Gives the policy that it is held to.
        reconciling: Opens what looks at versions, and puts them right; asked where there is something to do.
        is_wanted: Whether a registered model of this name is wanted.
    """

    registry_uri: str
    policy: Callable[[], Policy]
    reconciling: Callable[[], Reconciling]
    is_wanted: Callable[[str], bool]

    def repairs(self, ways: Collection[Way]) -> Iterator[Repair]:
        """What differs, and what was done about it; without a way nothing is written.

        The audit finds whom to look at, from all workspaces at once: whose row differs first, then all others
        in gated places, whose files are compared as at a read. The gate then looks at each by itself.

        Raises:
            LedgerError: The database cannot be read.
        """
        policy = self.policy()
        # All of it before anything is changed: the audit reads in a transaction.
        audited = list(database_rows(self.registry_uri, self.is_wanted, policy))
        by_their_rows = [row for row in audited if _differs(row)]
        by_their_files = [row for row in audited if not _differs(row) and _may_be_gated(row, policy)]
        for row in (*by_their_rows, *by_their_files):
            repair = self._look_and_repair(row, ways)
            if repair is not None:
                yield repair

    def _look_and_repair(self, row: AuditRow, ways: Collection[Way]) -> Repair | None:
        reconciling = self.reconciling()
        with _workspace(row.workspace):
            try:
                difference = reconciling.examine(row.model, row.version, row.workspace, current_actor())
            except MlflowException as error:
                if _is_gone(error):
                    return None  # it was deleted since the audit saw it
                raise
            if difference is None:
                return None
            return _repaired(reconciling, difference, ways) if ways else Repair(difference, None)


def _differs(row: AuditRow) -> bool:
    return row.violation is not None or bool(row.drift)


def _may_be_gated(row: AuditRow, policy: Policy) -> bool:
    """Whether a version is in a place that some gate for its model's name is for, with whatever tags."""
    places = (Target("stage", row.stage), *(Target("alias", alias) for alias in row.aliases))
    return any(rule.covers(place) for rule in policy.candidates(row.model) for place in places)


def _repaired(reconciling: Reconciling, difference: Difference, ways: Collection[Way]) -> Repair:
    """The repair; what goes wrong with one version is said of that one, and the pass goes on."""
    try:
        return reconciling.repair(difference, ways)
    except Exception as error:
        if isinstance(error, MlflowException) and _is_gone(error):
            return Repair(difference, "gone")
        request = difference.request
        _logger.exception("Putting %s version %s right failed", request.name, request.version)
        return Repair(difference, None, Refusal("failed", f"{error}", "The log has the details."))


def _is_gone(error: MlflowException) -> bool:
    return bool(error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST))


def reading_only(
    registry_uri: str, tracking_uri: str | None, policy: Policy, models: str | None
) -> Reconciliation:
    """Passes over a registry that may have no ledger yet, in which nothing is written."""

    @cache
    def reconciling() -> Reconciling:
        return Reconciling(Guard(reading_gate(connect(registry_uri), tracking_uri, policy)))

    return Reconciliation(registry_uri, lambda: policy, reconciling, wanted(models))


def sweeping(
    store: SafelockStore | SafelockWorkspaceStore,
    registry_uri: str,
    clients: Sequence[str] = (),
    *,
    only_known: bool = False,
) -> Sweeping:
    """What sweeps the artifact store of an open registry.

    Args:
        store: The registry.
        registry_uri: Its database.
        clients: Databases in which clients that guard the registry by themselves have their ledgers.
        only_known: Whether there are no others, whatever tags say.

    Raises:
        LedgerError: There is no ledger in one of them.
    """
    ledgers = tuple(_clients_ledger(uri) for uri in clients)
    return Sweeping(registry_uri, store.reconciling.gate, ledgers, only_known)


def _clients_ledger(uri: str) -> ClientsLedger:
    engine = open_database(uri)
    try:
        tables = sa.inspect(engine)
        if not all(tables.has_table(table.name) for table in (ledger.TABLE, leases.TABLE)):
            raise LedgerError(
                f"There is no ledger in the database {engine.url!r}.",
                next_step="Name the one that SAFELOCK_LEDGER names where the clients run.",
            )
    except sa.exc.SQLAlchemyError as error:
        raise LedgerError(f"The ledger in {engine.url!r} cannot be read: {error}.") from error
    finally:
        engine.dispose()
    return ClientsLedger(LedgerDatabase(uri))


def repairing(
    store: SafelockStore | SafelockWorkspaceStore, registry_uri: str, models: str | None
) -> Reconciliation:
    """Passes over an open registry that put right what they find, under the policy in force."""
    return Reconciliation(registry_uri, store.policy_source, lambda: store.reconciling, wanted(models))


def _workspace(name: str) -> AbstractContextManager[object]:
    return WorkspaceContext(name) if MLFLOW_ENABLE_WORKSPACES.get() else contextlib.nullcontext()
