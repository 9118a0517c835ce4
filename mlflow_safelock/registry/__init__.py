"""The registry store plugins: the only code that knows MLflow's store classes."""

from __future__ import annotations

from typing import Any


def make_store(store_uri: str, tracking_uri: str | None = None) -> Any:
    """What MLflow calls for a ``safelock+…`` registry URI: MLflow's own store with the gate in front.

    Args:
        store_uri: Registry URI, such as ``safelock+postgresql://user@host/db``.
        tracking_uri: Tracking URI of the same client or server, where MLflow gives it.

    Raises:
        PolicyError: The policy file cannot be used, so nothing could be decided.
    """
    # Imported here: MLflow loads every registered entry point at start, wanted or not.
    from mlflow_safelock.registry.stores import open_store

    return open_store(store_uri, tracking_uri)
