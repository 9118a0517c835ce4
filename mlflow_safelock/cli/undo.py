"""``safelock undo``."""

from __future__ import annotations

from pathlib import Path

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.options import (
    MlflowAddress,
    format_option,
    mlflow_options,
    new_folder_option,
    sharing_option,
)
from mlflow_safelock.cli.output import announce, facts_table, show_json, show_table
from mlflow_safelock.errors import SourceError
from mlflow_safelock.loading import fetch_mlflow_model, is_mlflow_model


@click.command(
    cls=Command,
    short_help="Write the unlocked fine-tune, out of a standalone model.",
    examples=(
        "safelock undo ./support-bot-locked --output ./support-bot",
        "safelock undo models:/support-bot/3 --output ./support-bot --tracking-uri http://127.0.0.1:5000",
    ),
)
@click.argument("locked", metavar="MODEL")
@new_folder_option
@sharing_option
@format_option
@mlflow_options
def undo(locked: str, output: Path, sharing: str, form: str, mlflow_address: MlflowAddress) -> None:
    """Write the fine-tune that MODEL was before it was locked; the locked model stays as it is.

    MODEL is a folder that safelock export or save_locked_checkpoint wrote, or a standalone model in MLflow:
    its folder or its URI. The source is not needed. Every file is compared with what is recorded of the
    source's: small files whole, files of weights by samples. Nothing changes in the registry.
    """
    mlflow_address.connect()
    if is_mlflow_model(locked):
        facts = _undo_model(locked, output, sharing)
    else:
        facts = _undo_folder(Path(locked), output, sharing)
    if form == "json":
        show_json(facts)
    else:
        words = {
            name: ", ".join(value) if isinstance(value, tuple) else value for name, value in facts.items()
        }
        show_table(facts_table("Unlocked", words.items()))


def _undo_folder(locked: Path, output: Path, sharing: str) -> dict[str, object]:
    from mlflow_safelock.apply.checkpoint import unlock_checkpoint

    if not locked.is_dir():
        raise SourceError(
            f"There is no folder {locked}.",
            next_step="Name a locked folder, or a URI such as models:/name/3.",
        )
    announce(f"Writing {output}")
    undone = unlock_checkpoint(locked, output, sharing=sharing)
    return {
        "folder": str(output),
        "files": undone.files,
        "missing": (),
        "lock": undone.lock,
        "alpha": undone.alpha,
    }


def _undo_model(locked: str, output: Path, sharing: str) -> dict[str, object]:
    announce(f"Fetching {locked}")
    from mlflow_safelock.flavors.overlay import FLAVOR_NAME, RECEIPT_FILE, read_mlmodel
    from mlflow_safelock.flavors.standalone import is_standalone, unlock_standalone
    from mlflow_safelock.provenance import LocalArtifacts, Receipt

    folder = fetch_mlflow_model(locked)
    artifacts = LocalArtifacts(folder)
    described = read_mlmodel(artifacts)
    if FLAVOR_NAME not in described["flavors"]:
        raise SourceError(f"{locked} is not locked.", next_step="There is nothing to undo.")
    if not is_standalone(described):
        receipt = Receipt.parse(artifacts.read(RECEIPT_FILE), origin=f"{locked}/{RECEIPT_FILE}")
        raise SourceError(
            f"{locked} is an overlay, which holds no weights: its fine-tune was never changed.",
            next_step=f"Use the fine-tune itself: {receipt.predicate.source.uri}",
        )
    announce(f"Writing {output}")
    undone = unlock_standalone(folder, output, sharing=sharing)
    return {
        "folder": str(output),
        "files": undone.files,
        "missing": undone.missing,
        "lock": undone.lock,
        "alpha": undone.alpha,
    }
