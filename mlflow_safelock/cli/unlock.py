"""``safelock unlock``."""

from __future__ import annotations

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.guarded import open_guarded, version_of
from mlflow_safelock.cli.options import MlflowAddress, format_option, mlflow_options
from mlflow_safelock.cli.output import facts_table, show_json, show_table

reason_option = click.option("--reason", required=True, metavar="TEXT", help="Why; it goes into the ledger.")


@click.command(
    cls=Command,
    short_help="Take the lock off a version in the registry.",
    examples=(
        "safelock unlock models:/support-bot/3 --reason 'to fine-tune it further' \\",
        "    --registry-uri safelock+postgresql://mlflow@db/mlflow",
    ),
)
@click.argument("version", metavar="URI", callback=version_of)
@reason_option
@format_option
@mlflow_options
def unlock(version: tuple[str, int], reason: str, form: str, mlflow_address: MlflowAddress) -> None:
    """Let the version at URI serve its fine-tune again, unlocked.

    It is refused while the version is in a gated stage or under a gated alias, or where the policy ("unlock")
    does not let you. The ledger keeps who did it, and why. This works on a registry that is guarded in this
    process (--registry-uri safelock+...), not through its server.
    """
    name, number = version
    location = open_guarded(mlflow_address).unlock(name, number, reason)
    if form == "json":
        show_json({"model": name, "version": number, "location": location})
    else:
        show_table(facts_table("Unlocked", [("version", f"models:/{name}/{number}"), ("serves", location)]))
