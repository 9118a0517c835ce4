"""``safelock ledger``: show and verify."""

from __future__ import annotations

import click

from mlflow_safelock.cli.command import CONTEXT_SETTINGS, Command, Group
from mlflow_safelock.cli.guarded import open_guarded
from mlflow_safelock.cli.options import MlflowAddress, format_option, mlflow_options
from mlflow_safelock.cli.output import announce, facts_table, show_json, show_table


@click.group(
    cls=Group,
    context_settings=CONTEXT_SETTINGS,
    examples=(
        "safelock ledger verify --registry-uri safelock+sqlite:///registry.db",
        "safelock ledger show --model support-bot --registry-uri safelock+sqlite:///registry.db",
    ),
)
def ledger() -> None:
    """Read and check what the gate decided.

    The ledger is a table beside MLflow's own; each row is chained to the one before by its hash.
    """


@ledger.command(
    cls=Command,
    short_help="Check that no row was edited, removed or reordered.",
    examples=("safelock ledger verify --registry-uri safelock+postgresql://mlflow@db/mlflow",),
)
@format_option
@mlflow_options
def verify(form: str, mlflow_address: MlflowAddress) -> None:
    """Walk the chain from the first row to the last, and name the first that does not fit.

    What it cannot notice is an end that was cut off, or written anew with every digest from there on: keep
    the number of rows and the head that it prints somewhere else, and compare.
    """
    from mlflow_safelock.gate.ledger import verify_chain

    store = open_guarded(mlflow_address)
    announce("Walking the ledger")
    with store.engine.connect() as connection:
        chain = verify_chain(connection)
    if form == "json":
        show_json({"ok": True, "rows": chain.rows, "head": chain.head})
    else:
        show_table(facts_table("The ledger holds", [("rows", chain.rows), ("head", chain.head)]))


@ledger.command(
    cls=Command,
    short_help="Show the last decisions.",
    examples=("safelock ledger show --limit 5 --registry-uri safelock+sqlite:///registry.db",),
)
@click.option("--model", metavar="NAME", help="Of this registered model only.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many rows.")
@format_option
@mlflow_options
def show(model: str | None, limit: int, form: str, mlflow_address: MlflowAddress) -> None:
    """Show the last rows of the ledger, newest first."""
    from rich.table import Table
    from sqlalchemy.orm import Session

    from mlflow_safelock.gate.ledger import last_entries

    with Session(open_guarded(mlflow_address).engine) as session:
        rows = last_entries(session, limit, model)
    if form == "json":
        show_json([{"sequence": number, **entry.model_dump(mode="json")} for number, entry in rows])
        return
    table = Table("row", "when", "event", "model", "target", "by", "why", box=None, pad_edge=False)
    for number, entry in rows:
        version = f"{entry.model} {entry.version}" if entry.version else entry.model
        by = entry.actor.name if entry.actor.verified else f"{entry.actor.name} (claimed)"
        table.add_row(
            str(number), entry.time[:19], entry.event, version, entry.target, by, entry.reason or ""
        )
    show_table(table)
