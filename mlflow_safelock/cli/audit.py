"""``safelock audit``."""

from __future__ import annotations

import os
from dataclasses import asdict

import click

from mlflow_safelock.cli.audit_table import show_rows
from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.options import MlflowAddress, format_option, mlflow_options
from mlflow_safelock.cli.output import counted, show_json, show_lines, working

VIOLATIONS = 3
"""Exit code where a version is in a gated place without having passed the gate, or under a bad lock."""


@click.command(
    cls=Command,
    short_help="Show which registered model versions are locked.",
    examples=(
        "safelock audit --registry-uri sqlite:///registry.db",
        "safelock audit --tracking-uri http://mlflow:5000 --model 'support-*'",
        "safelock audit --format json | jq '.[] | select(.state != \"locked\")'",
    ),
)
@click.option(
    "--model",
    "models",
    metavar="GLOB",
    help="Only registered models of such names.  [default: all but locks]",
)
@format_option
@mlflow_options
def audit(models: str | None, form: str, mlflow_address: MlflowAddress) -> None:
    """Show which registered model versions are locked, and what proves it.

    Where the registry is a database, a version is locked if the ledger holds the promotion that wrote what
    it serves. Through a server the ledger cannot be reached, and the evidence is the receipt in the locked
    model; the column "evidence" says which. Tags are never evidence: where they disagree, it is listed below
    the table.

    Where --registry-uri begins with safelock+, or SAFELOCK_POLICY is set, versions in a database are held to
    that policy: where one is in a gated stage or alias without having passed the gate, or runs a lock there
    that was revoked, is below the policy's floor or too old, the exit code is 3. Only rows are looked at:
    safelock reconcile also finds files that were changed, and without an option it writes nothing.
    """
    # MLflow's bars, one for each receipt, say less than the count of versions does.
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    with working("Opening the registry"):
        from mlflow_safelock.audit import audit_rows

        mlflow_address.reach()
        found = audit_rows(mlflow_address.registry_uri, mlflow_address.tracking_uri, models=models)
    rows = counted(found, "Model versions")
    if form == "json":
        show_json([asdict(row) for row in rows])
    elif rows:
        show_rows(rows)
    else:
        show_lines(
            "No model versions are registered here." if models is None else f"No model is like {models}."
        )
    violations = sum(row.violation is not None for row in rows)
    if violations:
        click.echo(f"Error: {violations} model version(s) did not pass the gate of where they are.", err=True)
        click.echo("Next: Promote them again, which locks them, or take them out of there.", err=True)
    faulty = sum(bool(row.lock_faults) for row in rows)
    if faulty:
        click.echo(f"Error: {faulty} model version(s) run a lock that would not be applied today.", err=True)
        click.echo("Next: Register a lock that would be, and promote them again.", err=True)
    if violations or faulty:
        click.get_current_context().exit(VIOLATIONS)
