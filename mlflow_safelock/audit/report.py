"""The audit: every registered model version, and whether what it serves is locked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

from mlflow.tracking import is_tracking_uri_set
from mlflow.tracking._model_registry.utils import _resolve_registry_uri

from mlflow_safelock.audit.aging_locks import lock_reader
from mlflow_safelock.audit.database import SCHEME_PREFIX, database_rows, is_database
from mlflow_safelock.audit.rows import AuditRow
from mlflow_safelock.audit.server import server_rows
from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from mlflow_safelock.gate.policy import Policy
from mlflow_safelock.gate.policy_file import PolicySource
from mlflow_safelock.settings import read_settings

LOCK_MODELS = lock_model_name("*")
"""Glob over the registered models that hold locks."""


def audit(
    registry_uri: str | None = None, tracking_uri: str | None = None, *, models: str | None = None
) -> tuple[AuditRow, ...]:
    """Report of every registered model version whether it is locked, on evidence.

    Where the registry is a database, the evidence is the ledger: a version is locked if its download location
    is the one that a promotion wrote. Through a server the ledger cannot be reached, and the evidence is the
    receipt in the locked model; the rows say which. Tags are never evidence.

    Where the registry is a gated database, or ``SAFELOCK_POLICY`` is set, a version of a database's is also
    held to the policy: one that is in a gated stage or alias without having passed the gate is a violation,
    and one that runs a lock there which was revoked, is below the policy's floor or too old, has that told
    (``lock_faults``). How old a lock is takes its artifact, which is read where the policy asks for that.

    Args:
        registry_uri: A database URI, with or without the prefix ``safelock+``, or a server's address;
            MLflow's current registry where not given.
        tracking_uri: Where proxied artifacts are fetched through; MLflow's current one where not given, or
            the registry's server where MLflow has none.
        models: Glob over registered model names, case-sensitive; all but the locks where not given.

    Returns:
        The rows, by workspace, name and version.

    Raises:
        LedgerError: The database is not there, holds no registry, or cannot be read.
        PolicyError: ``SAFELOCK_POLICY`` names a file that cannot be used.
        mlflow.exceptions.MlflowException: The server cannot be reached.

    Example:
        >>> audit("safelock+sqlite:///registry.db")  # doctest: +SKIP
        (AuditRow(workspace='default', model='support-bot', version=3, stage='Staging', ...),)
    """
    return tuple(audit_rows(registry_uri, tracking_uri, models=models))


def audit_rows(
    registry_uri: str | None = None, tracking_uri: str | None = None, *, models: str | None = None
) -> Iterator[AuditRow]:
    """The rows of ``audit``, one by one as they are found: through a server each takes a few requests."""
    registry = _resolve_registry_uri(registry_uri, tracking_uri)

    if is_database(registry):
        return database_rows(registry, wanted(models), _policy_of(registry), lock_reader(tracking_uri))
    if tracking_uri is None and not is_tracking_uri_set():
        # A server is both, and its artifacts are to be had nowhere else.
        tracking_uri = registry
    return server_rows(registry, tracking_uri, wanted(models))


def wanted(models: str | None) -> Callable[[str], bool]:
    """Whether a registered model is wanted: its name matches the glob, or, without one, it is no lock."""
    if models is None:
        return lambda model: not fnmatchcase(model, LOCK_MODELS)
    return lambda model: fnmatchcase(model, models)


def _policy_of(registry: str) -> Policy | None:
    """The policy that a database's versions are held to; none where nothing says that they are gated."""
    is_gated = registry.startswith(SCHEME_PREFIX) or read_settings().policy is not None
    return PolicySource()() if is_gated else None
