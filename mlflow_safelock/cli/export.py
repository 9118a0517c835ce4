"""``safelock export``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.options import MlflowAddress, mlflow_options, new_folder_option, sharing_option
from mlflow_safelock.cli.output import announce, facts_table, in_words, moving, show_lines, show_table
from mlflow_safelock.errors import SourceError
from mlflow_safelock.loading import fetch_mlflow_model


@click.command(
    cls=Command,
    short_help="Write a locked model as a standalone folder.",
    examples=(
        "safelock export models:/support-bot/Staging --output ./support-bot-locked",
        "vllm serve ./support-bot-locked",
    ),
)
@click.argument("uri")
@new_folder_option
@click.option(
    "--source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Local copy of the fine-tune, used in place of a download; it must have the receipt's fingerprint.",
)
@sharing_option
@mlflow_options
def export(
    uri: str,
    output: Path,
    source: Path | None,
    sharing: Literal["copy", "link"],
    mlflow_address: MlflowAddress,
) -> None:
    """Write the locked model at URI as a folder that stock software loads locked.

    URI is that of a locked version: models:/name/Staging, models:/name@champion, models:/name/3. Lock and
    alpha are those of its receipt; the fine-tune is fetched and compared with the receipt's fingerprint; the
    folder is loaded once with stock transformers and compared before it counts as written. Of a version that
    is a standalone model already, the folder is taken as it is, once it is what its receipt says.
    """
    announce(f"Fetching {uri}")
    mlflow_address.connect()
    folder = fetch_mlflow_model(uri)
    if _is_standalone(folder, uri):
        facts = _export_standalone(folder, output, source, sharing)
    else:
        facts = _export_overlay(folder, output, source, sharing)
    show_table(facts_table("Exported", facts))
    show_lines(
        "",
        "Serve it with software that knows nothing of locks:",
        f"  vllm serve {output}",
        f'  transformers.pipeline("text-generation", "{output}")',
    )


def _is_standalone(folder: Path, uri: str) -> bool:
    from mlflow_safelock.flavors.overlay import FLAVOR_NAME, read_mlmodel
    from mlflow_safelock.flavors.standalone import is_standalone
    from mlflow_safelock.provenance import LocalArtifacts

    described = read_mlmodel(LocalArtifacts(folder))
    if FLAVOR_NAME not in described["flavors"]:
        raise SourceError(
            f"{uri} is not locked, and only locked models are exported.",
            next_step="Promote it through a guarded registry first, for example to Staging. Which versions "
            "are locked: safelock audit",
        )
    return is_standalone(described)


def _export_overlay(
    folder: Path, output: Path, source: Path | None, sharing: Literal["copy", "link"]
) -> list[tuple[str, object]]:
    """Lock the fine-tune anew, as the overlay's receipt says."""
    from mlflow_safelock.apply import save_locked_checkpoint
    from mlflow_safelock.flavors.locked_model import fetch_source
    from mlflow_safelock.flavors.overlay import read_overlay
    from mlflow_safelock.provenance import LocalArtifacts

    overlay = read_overlay(LocalArtifacts(folder))
    fine_tune = fetch_source(overlay, None if source is None else str(source))
    predicate = overlay.receipt.predicate
    announce(f"Writing {output}, and comparing what stock transformers makes of it")
    with moving() as progress:
        report = save_locked_checkpoint(
            fine_tune,
            output,
            overlay.lock,
            predicate.alpha,
            sharing=sharing,
            progress=progress,
            require_effect=True,
        )
    return [
        ("folder", report.folder),
        ("files", ", ".join(report.files)),
        ("left out", ", ".join(report.left_out)),
        ("carrier", report.carrier),
        ("weights", in_words(report.shared.values())),
        ("layers with a bias", report.biases),
        ("bias error", f"{report.bias_error:.1e}, relative"),
        ("base model", predicate.lock.base_model),
        ("lock", report.lock),
        ("alpha", report.alpha),
        ("receipt", overlay.receipt.digest),
        ("check", report.check),
        ("largest logit difference", report.max_logit_difference),
        ("largest change by the lock", report.max_logit_change),
    ]


def _export_standalone(
    folder: Path, output: Path, source: Path | None, sharing: Literal["copy", "link"]
) -> list[tuple[str, object]]:
    """Take the folder that stock software loads out of a model that is locked in its own weights."""
    from mlflow_safelock.flavors.standalone import export_standalone, files_below

    if source is not None:
        raise SourceError(
            "This version has the lock in its own weights, so the fine-tune is not asked for.",
            next_step="Leave --source away.",
        )
    announce(f"Writing {output}")
    receipt, ways = export_standalone(folder, output, sharing=sharing)
    predicate = receipt.predicate
    return [
        ("folder", output),
        ("files", ", ".join(sorted(files_below(output)))),
        ("carrier", "standalone, as it was prepared"),
        ("weights", in_words(ways.values())),
        ("base model", predicate.lock.base_model),
        ("lock", predicate.lock.digest),
        ("alpha", predicate.alpha),
        ("receipt", receipt.digest),
        ("check", f"its files are those of the receipt; when it was written: {predicate.check}"),
    ]
