"""Writing a fine-tune with a lock in it, as a folder that needs none of this package to be loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mlflow_safelock.apply.alpha import checked_alpha
from mlflow_safelock.apply.checkpoint.biases import biases_of
from mlflow_safelock.apply.checkpoint.card import locked_card
from mlflow_safelock.apply.checkpoint.configuration import carrier_in_words, locked_values
from mlflow_safelock.apply.checkpoint.folder import check_destination, copy_file, written_aside
from mlflow_safelock.apply.checkpoint.reload import confirm_by_reloading
from mlflow_safelock.apply.checkpoint.report import CheckpointReport
from mlflow_safelock.apply.checkpoint.source import CheckpointSource, read_source
from mlflow_safelock.apply.checkpoint.tokenizer import keep_tokenizer
from mlflow_safelock.apply.checkpoint.writing import write_weights
from mlflow_safelock.apply.in_memory import check_geometry
from mlflow_safelock.errors import CheckpointError
from mlflow_safelock.lock import SafetyLock


def save_locked_checkpoint(
    source_dir: str | os.PathLike[str],
    dest_dir: str | os.PathLike[str],
    lock: SafetyLock,
    alpha: float = 6.0,
) -> CheckpointReport:
    """Write a locked copy of a fine-tune that stock ``transformers`` loads, locked, from its folder alone.

    The biases ``W_o v`` are stored in the checkpoint, and the configuration asks for them. The folder appears
    only once it was loaded by stock ``transformers`` and gave the logits of the source with the lock applied
    in memory; if anything fails, nothing is left. The source is only read.

    Args:
        source_dir: The unlocked fine-tune: a folder that ``save_pretrained`` wrote, or the folder of a model
            that ``mlflow.transformers`` logged.
        dest_dir: The folder to write. It must not exist; its parent must.
        lock: A lock of the fine-tune's base.
        alpha: Strength; negative pushes the other way, and the model card and configuration say so.

    Returns:
        What was written, and how it was confirmed.

    Raises:
        AlphaError: Alpha is not a finite number other than zero, or too large for the weights' dtype.
        AlreadyLockedError: The source carries a lock.
        CheckpointError: The source cannot be read or is of a kind that cannot be locked, the folder cannot be
            written, or it did not reload as it should.
        LockMismatchError: The lock is for another attention shape.
        UnsupportedArchitectureError: No checkpoint of this architecture can hold the biases.
    """
    strength = checked_alpha(alpha)
    source_folder, folder = Path(source_dir), Path(dest_dir)
    check_destination(folder)
    if folder.resolve().is_relative_to(source_folder.resolve()):
        raise CheckpointError(
            f"{folder} lies in the source {source_folder}.", next_step="Name another folder."
        )
    source = read_source(source_folder)
    check_geometry(lock, source.geometry, str(source_folder))
    biases = biases_of(source, lock, strength)
    values = locked_values(source, lock, strength)
    with written_aside(folder) as beside:
        write_weights(source.weights, biases, beside)
        for name, path in source.layout.carried.items():
            copy_file(path, beside / name)
        _write_text(beside / "config.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        _write_text(beside / "README.md", locked_card(source.layout.card, lock, strength))
        if _tokenizer_may_change(source, values["model_type"]):
            keep_tokenizer(source.layout, beside)
        confirmation = confirm_by_reloading(source.layout.model, beside, lock, strength)
        files = tuple(sorted(str(path.relative_to(beside)) for path in beside.rglob("*") if path.is_file()))
    return CheckpointReport(
        folder=folder,
        files=files,
        left_out=_left_out(source),
        carrier=carrier_in_words(source),
        biases=len(biases.layers),
        lock=lock.digest,
        alpha=strength,
        check=confirmation.check,
        max_logit_difference=confirmation.max_logit_difference,
        max_logit_change=confirmation.max_logit_change,
    )


def _tokenizer_may_change(source: CheckpointSource, model_type: str) -> bool:
    layout = source.layout
    if layout.tokenizer is None:
        return False
    return layout.tokenizer != layout.model or model_type != source.architecture.model_type


def _left_out(source: CheckpointSource) -> tuple[str, ...]:
    """Files of the source that are not in the locked checkpoint in one form or another."""
    unused = {path.name for path in source.layout.model.glob("*.safetensors")} - set(source.weights.files)
    return tuple(sorted({*source.layout.left_out, *unused}))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
