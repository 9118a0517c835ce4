"""``safelock unlock`` and ``safelock undo``."""

from __future__ import annotations

from pathlib import Path

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.guarded import open_guarded, version_of
from mlflow_safelock.cli.options import MlflowAddress, format_option, mlflow_options
from mlflow_safelock.cli.output import announce, facts_table, show_json, show_table

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

    It is refused while the version is in a gated stage or under a gated alias, or where the policy says
    "unlock: deny". The ledger keeps who did it, and why. This works on the registry's own database
    (--registry-uri safelock+...), not through a server.
    """
    name, number = version
    location = open_guarded(mlflow_address).unlock(name, number, reason)
    if form == "json":
        show_json({"model": name, "version": number, "location": location})
    else:
        show_table(facts_table("Unlocked", [("version", f"models:/{name}/{number}"), ("serves", location)]))


@click.command(
    cls=Command,
    short_help="Write an unlocked copy of a standalone folder.",
    examples=("safelock undo ./locked-model --output ./unlocked-model",),
)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write; it must not exist.",
)
@click.option("--copy", is_flag=True, help="Copy files of weights, in place of sharing them where possible.")
@format_option
def undo(folder: Path, output: Path, copy: bool, form: str) -> None:
    """Write the fine-tune that a locked FOLDER was made from, byte for byte.

    FOLDER is what "safelock export" writes, or the "model" folder of a standalone model in MLflow, or the
    folder around that.
    """
    from mlflow_safelock.apply.checkpoint import unlock_checkpoint
    from mlflow_safelock.apply.checkpoint.layout import RECORD_FILE

    inner = folder / "model"
    locked = inner if not (folder / RECORD_FILE).is_file() and (inner / RECORD_FILE).is_file() else folder
    announce(f"Reading {locked}")
    report = unlock_checkpoint(locked, output, sharing="copy" if copy else "link")
    if form == "json":
        show_json({"folder": str(report.folder), "files": list(report.files), "lock": report.lock})
    else:
        show_table(
            facts_table(
                "Unlocked",
                [("folder", report.folder), ("files", len(report.files)), ("lock taken off", report.lock)],
            )
        )
