"""``safelock export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.models import fetch_mlflow_model
from mlflow_safelock.cli.options import MlflowAddress, mlflow_options
from mlflow_safelock.cli.output import announce, facts_table, show_lines, show_table
from mlflow_safelock.errors import SourceError

if TYPE_CHECKING:
    from mlflow_safelock.flavors.overlay import Overlay


def _not_there_yet(_context: click.Context, _parameter: click.Parameter, path: Path) -> Path:
    if path.exists():
        raise click.BadParameter(f"{path} exists already; name a new folder.")
    return path


@click.command(
    cls=Command,
    short_help="Write a locked model as a standalone folder.",
    examples=(
        "safelock export models:/support-bot/Staging --output ./support-bot-locked",
        "vllm serve ./support-bot-locked",
    ),
)
@click.argument("uri")
@click.option(
    "--output",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    callback=_not_there_yet,
    help="Folder to write; it must not exist.",
)
@click.option(
    "--source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Local copy of the fine-tune, used in place of a download; it must have the receipt's fingerprint.",
)
@mlflow_options
def export(uri: str, output: Path, source: Path | None, mlflow_address: MlflowAddress) -> None:
    """Write the locked model at URI as a folder that stock software loads locked.

    URI is that of a locked version: models:/name/Staging, models:/name@champion, models:/name/3. Lock and
    alpha are those of its receipt; the fine-tune is fetched and compared with the receipt's fingerprint; the
    folder is loaded once with stock transformers and compared before it counts as written.
    """
    announce(f"Fetching {uri}")
    from mlflow_safelock.apply import save_locked_checkpoint
    from mlflow_safelock.flavors.locked_model import fetch_source

    mlflow_address.connect()
    overlay = _read_locked(uri)
    fine_tune = fetch_source(overlay, None if source is None else str(source))
    predicate = overlay.receipt.predicate
    announce(f"Writing {output}, and comparing what stock transformers makes of it")
    report = save_locked_checkpoint(fine_tune, output, overlay.lock, predicate.alpha)
    show_table(
        facts_table(
            "Exported",
            [
                ("folder", report.folder),
                ("files", ", ".join(report.files)),
                ("left out", ", ".join(report.left_out)),
                ("carrier", report.carrier),
                ("layers with a bias", report.biases),
                ("base model", predicate.lock.base_model),
                ("lock", report.lock),
                ("alpha", report.alpha),
                ("receipt", overlay.receipt.digest),
                ("check", report.check),
                ("largest logit difference", report.max_logit_difference),
                ("largest change by the lock", report.max_logit_change),
            ],
        )
    )
    show_lines(
        "",
        "Serve it with software that knows nothing of locks:",
        f"  vllm serve {output}",
        f'  transformers.pipeline("text-generation", "{output}")',
    )


def _read_locked(uri: str) -> Overlay:
    from mlflow_safelock.flavors.overlay import FLAVOR_NAME, read_mlmodel, read_overlay
    from mlflow_safelock.provenance import LocalArtifacts

    folder = LocalArtifacts(fetch_mlflow_model(uri))
    if FLAVOR_NAME not in read_mlmodel(folder)["flavors"]:
        raise SourceError(
            f"{uri} is not locked, and only locked models are exported.",
            next_step="Promote it through a guarded registry first, for example to Staging. Which versions "
            "are locked: safelock audit",
        )
    return read_overlay(folder)
