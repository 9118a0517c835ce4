"""Whether this server guards its registry: asked of the very store that answers its clients."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from typing import Any

from mlflow_safelock.errors import PolicyError
from mlflow_safelock.operations.database import ask_database, read_ledger_head
from mlflow_safelock.operations.destination import reach, server_destination
from mlflow_safelock.operations.findings import Finding, found
from mlflow_safelock.operations.policy import ask_policy
from mlflow_safelock.registry.schemes import scheme_fault
from mlflow_safelock.registry.stores import SafelockStore, SafelockWorkspaceStore

_logger = logging.getLogger(__name__)

ANSWERS_WITHIN = 10.0
"""Seconds that each check has, so that a probe gets its answer."""

_checks = ThreadPoolExecutor(max_workers=8, thread_name_prefix="safelock-health")

NEXT_IN_THE_LOG = "The server's log has the details."


def examine_server() -> tuple[Finding, ...]:
    """Every check of this process, each within ``ANSWERS_WITHIN`` seconds.

    No finding holds a password or anything that a driver or another library said.
    """
    running = [(name, _checks.submit(check)) for name, check in _all_checks()]
    return tuple(_outcome(name, check) for name, check in running)


def _all_checks() -> Iterator[tuple[str, Callable[[], Finding]]]:
    store = _store()
    yield "registry", lambda: _ask_whose(store)
    if isinstance(store, SafelockStore | SafelockWorkspaceStore):
        yield "policy", lambda: ask_policy(store.policy_source)
        yield "database", lambda: ask_database(store.engine)
        yield "ledger", lambda: read_ledger_head(store.engine)
    yield "artifacts", _ask_artifacts


def _store() -> Any:
    """The registry store of this process; the error where MLflow cannot open one."""
    from mlflow.server.handlers import _get_model_registry_store

    try:
        return _get_model_registry_store()
    except Exception as error:  # a plugin's own, and MLflow's, and the database's
        _logger.error("The registry store cannot be opened", exc_info=error)
        return error


def registry_uri() -> str:
    """The registry URI that this server was started with."""
    from mlflow.server import BACKEND_STORE_URI_ENV_VAR, REGISTRY_STORE_URI_ENV_VAR

    return os.environ.get(REGISTRY_STORE_URI_ENV_VAR) or os.environ.get(BACKEND_STORE_URI_ENV_VAR) or ""


def _ask_whose(store: Any) -> Finding:
    fault = scheme_fault(registry_uri())
    if isinstance(store, SafelockStore | SafelockWorkspaceStore):
        facts = {"store": type(store).__name__}
        if fault is not None:
            # Ours this time: which of two wins is decided anew at every start.
            return Finding("registry", "fault", *fault, facts)
        return Finding("registry", "ok", f"The registry is gated, by {type(store).__name__}.", "", facts)
    if isinstance(store, Exception):
        opened = f"The registry store cannot be opened ({type(store).__name__})."
        if isinstance(store, PolicyError):
            opened = "The policy cannot be used, so the registry was not opened."
        cause, next_step = fault or (opened, NEXT_IN_THE_LOG)
        return Finding("registry", "fault", cause, next_step)
    cause, next_step = fault or ("The registry is not gated.", NEXT_IN_THE_LOG)
    whose = f"{type(store).__module__}.{type(store).__name__}"
    return Finding("registry", "fault", f"{cause} The store in use is {whose}.", next_step, {"store": whose})


def _ask_artifacts() -> Finding:
    destination = server_destination()
    if not destination:
        return Finding("artifacts", "skipped", "This server has no artifact destination of its own.")
    return reach(destination)


def _outcome(name: str, check: Future[Finding]) -> Finding:
    def look() -> Finding:
        try:
            finding = check.result(timeout=ANSWERS_WITHIN)
        except TookTooLong:
            return Finding(
                name, "fault", f"This check got no answer within {ANSWERS_WITHIN:g} seconds.", NEXT_IN_THE_LOG
            )
        return finding

    return found(name, look)
