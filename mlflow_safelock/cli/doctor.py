"""``safelock doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.options import MlflowAddress, format_option, mlflow_options
from mlflow_safelock.cli.output import new_table, show_json, show_lines, show_table, shown, working

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlflow_safelock.operations.findings import Finding

_WORDS = {"ok": "ok", "skipped": "not looked at", "warning": "warning", "fault": "must fix"}


@click.command(
    cls=Command,
    short_help="Check an installation, and say what to fix.",
    examples=(
        "safelock doctor --registry-uri safelock+postgresql://mlflow@db/mlflow \\",
        "    --tracking-uri postgresql://mlflow@db/mlflow --artifacts-destination s3://models",
        "safelock doctor --tracking-uri http://mlflow:5000 --format json",
    ),
)
@click.option(
    "--artifacts-destination",
    metavar="URI",
    help="What mlflow server is given by this name; a small file is written there and deleted again.",
)
@format_option
@mlflow_options
def doctor(artifacts_destination: str | None, form: str, mlflow_address: MlflowAddress) -> None:
    """Look at this environment and at the registry, and say what must be fixed and how.

    Run it where the server runs, with the server's environment, naming the server's own databases. Where the
    address is a server's (http://…), that server is asked for its own findings (/safelock/health), and only
    what is this machine's is looked at here. The exit code is 1 where something must be fixed.
    """
    with working("Looking at the installation"):
        import mlflow

        from mlflow_safelock.operations.doctor import Installation, examine

        mlflow_address.connect()
        findings = examine(
            Installation(
                registry_uri=str(mlflow.get_registry_uri()),
                is_registry_named=mlflow_address.registry_uri is not None,
                tracking_uri=mlflow_address.tracking_uri,
                destination=artifacts_destination,
            )
        )
    faults = [finding for finding in findings if finding.status == "fault"]
    if form == "json":
        status = "fault" if faults else "ok"
        show_json({"status": status, "checks": [finding.as_json() for finding in findings]})
    else:
        _show(findings)
    if faults:
        click.echo(f"Error: {len(faults)} of {len(findings)} findings must be fixed.", err=True)
        click.get_current_context().exit(1)


def _show(findings: Sequence[Finding]) -> None:
    table = new_table(None, "check", "finding", "what", "next step")
    for finding in findings:
        table.add_row(
            shown(finding.check), _WORDS[finding.status], shown(finding.message), shown(finding.next_step)
        )
    show_table(table)
    settings = [one for finding in findings for one in finding.facts.get("settings", ())]
    if settings:
        show_lines("")
        table = new_table(None, "setting", "value", "from")
        for setting in settings:
            table.add_row(shown(setting["variable"]), shown(setting["value"]), shown(setting["origin"]))
        show_table(table)
