"""The guarded registry that commands work on directly, and the versions that they name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from mlflow_safelock.cli.options import MlflowAddress
from mlflow_safelock.errors import SourceError

if TYPE_CHECKING:
    from mlflow_safelock.registry.stores import SafelockStore, SafelockWorkspaceStore

_VERSION = re.compile(r"models:/(?P<name>[^/@]+)/(?P<version>[0-9]+)")


def version_of(_context: click.Context, _parameter: click.Parameter, uri: str) -> tuple[str, int]:
    """Name and number of a model version, out of its URI; a callback for arguments."""
    found = _VERSION.fullmatch(uri)
    if found is None:
        raise click.BadParameter(f"{uri!r} is not of the form models:/name/3.")
    return found["name"], int(found["version"])


def open_guarded(mlflow_address: MlflowAddress) -> SafelockStore | SafelockWorkspaceStore:
    """Open the registry's own database with the gate in front of it.

    Raises:
        SourceError: The address is not one of a guarded database.
        PolicyError: The policy file cannot be used.
    """
    import mlflow

    mlflow_address.connect()
    registry_uri = mlflow.get_registry_uri()
    if not registry_uri.startswith("safelock+"):
        raise SourceError(
            f"The registry at {registry_uri} is not one that safelock guards in this process.",
            next_step="Give the database with --registry-uri safelock+sqlite:///... or safelock+postgresql://...",
        )
    from mlflow_safelock.registry.stores import open_store

    return open_store(registry_uri, mlflow.get_tracking_uri())
