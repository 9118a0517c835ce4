"""The guarded registry that commands work on directly, and the versions that they name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlflow_safelock.cli.options import MlflowAddress
from mlflow_safelock.errors import LedgerError, SourceError

if TYPE_CHECKING:
    import sqlalchemy as sa

    from mlflow_safelock.gate.explanation import Explanation
    from mlflow_safelock.gate.policy import Policy
    from mlflow_safelock.gate.ports import Target
    from mlflow_safelock.registry.stores import GuardedStore

F = TypeVar("F", bound=Callable[..., Any])

_VERSION = re.compile(r"models:/(?P<name>[^/@]+)/(?P<version>[0-9]+)")


def version_of(_context: click.Context, _parameter: click.Parameter, uri: str) -> tuple[str, int]:
    """Name and number of a model version, out of its URI; a callback for arguments."""
    found = _VERSION.fullmatch(uri)
    if found is None:
        raise click.BadParameter(f"{uri!r} is not of the form models:/name/3.")
    return found["name"], int(found["version"])


destination_option = click.option(
    "--artifacts-destination",
    metavar="URI",
    help="What mlflow server was given by this name, where clients reach artifacts through the server.",
)


def use_destination(uri: str | None) -> None:
    """Resolve artifact URIs of a server as its own process does."""
    from mlflow_safelock.registry.artifacts import DESTINATION_VARIABLE

    if uri is not None:
        os.environ[DESTINATION_VARIABLE] = uri


def target_options(function: F) -> F:
    """The options ``--stage`` and ``--alias``; see ``target_of``."""
    for option in (
        click.option("--alias", metavar="NAME", help="Alias that it would get."),
        click.option(
            "--stage",
            type=click.Choice(["Staging", "Production", "Archived", "None"], case_sensitive=False),
            help="Stage that it would come into.",
        ),
    ):
        function = option(function)
    return function


def target_of(stage: str | None, alias: str | None) -> Target:
    """Where a version is to go: to a stage, or under an alias.

    Raises:
        click.UsageError: Neither is given, or both.
    """
    from mlflow_safelock.gate.ports import Target

    if (stage is None) == (alias is None):
        raise click.UsageError("Say where it goes: --stage STAGE, or --alias NAME.")
    return Target("stage", stage) if stage is not None else Target("alias", alias or "")


def explain(
    mlflow_address: MlflowAddress, policy: Policy, version: tuple[str, int], target: Target
) -> Explanation:
    """Find out what a promotion would do, on the registry's own database; see ``gate.explanation``.

    Raises:
        SourceError: The address is not one of a database.
    """
    import mlflow

    from mlflow_safelock.registry.explaining import explain_promotion

    uri = database_of(mlflow_address, "only its server knows what it would do")
    return explain_promotion(uri, mlflow.get_tracking_uri(), policy, *version, target)


def database_of(mlflow_address: MlflowAddress, why: str) -> str:
    """The registry's address, where it is one of a database; ``why`` says what needs that."""
    import mlflow

    from mlflow_safelock.audit.database import is_database

    mlflow_address.connect()
    uri = str(mlflow.get_registry_uri())
    if not is_database(uri):
        raise SourceError(
            f"The registry at {uri} is not a database, and {why}.",
            next_step="Give the database with --registry-uri safelock+sqlite:///... or safelock+postgresql://...",
        )
    return uri


def open_ledger(mlflow_address: MlflowAddress) -> sa.Engine:
    """The registry's own database, with a ledger in it, to be read; nothing is written by opening it.

    Raises:
        SourceError: The address is not one of a database.
        LedgerError: There is no ledger in it.
    """
    import mlflow
    import sqlalchemy as sa

    from mlflow_safelock.gate.ledger import TABLE
    from mlflow_safelock.registry.stores import ledger_engine

    mlflow_address.connect()
    address = str(mlflow.get_registry_uri())
    if not address.startswith("safelock+http"):
        address = database_of(mlflow_address, "its ledger cannot be reached through a server")
    engine: sa.Engine = ledger_engine(address)
    if not sa.inspect(engine).has_table(TABLE.name):
        raise LedgerError(
            f"There is no ledger in the database {engine.url.render_as_string(hide_password=True)}.",
            next_step="A registry has one once it was opened with the gate in front: safelock+sqlite:///…",
        )
    return engine


def open_guarded(mlflow_address: MlflowAddress) -> GuardedStore:
    """Open the registry with the gate in front of it: its own database, or a server from the client's side.

    Raises:
        SourceError: The address is not one of a guarded registry.
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
