"""Writing a fine-tune with a lock in it, as a folder that needs none of this package to be loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mlflow_safelock.apply.alpha import checked_alpha
from mlflow_safelock.apply.checkpoint.biases import biases_of
from mlflow_safelock.apply.checkpoint.card import locked_card
from mlflow_safelock.apply.checkpoint.configuration import carrier_in_words, locked_values
from mlflow_safelock.apply.checkpoint.confirmation import Verify, checked_verify, confirm
from mlflow_safelock.apply.checkpoint.folder import check_destination, written_aside
from mlflow_safelock.apply.checkpoint.progress import Meter, Progress, silent
from mlflow_safelock.apply.checkpoint.record import write_record
from mlflow_safelock.apply.checkpoint.report import CheckpointReport
from mlflow_safelock.apply.checkpoint.sharing import own_file, way_of
from mlflow_safelock.apply.checkpoint.source import CheckpointSource, read_source
from mlflow_safelock.apply.checkpoint.stillness import refuse_changed, stamps_of
from mlflow_safelock.apply.checkpoint.tokenizer import keep_tokenizer
from mlflow_safelock.apply.checkpoint.weights import INDEX_FILE
from mlflow_safelock.apply.checkpoint.writing import write_weights
from mlflow_safelock.apply.effect import check_effect
from mlflow_safelock.apply.in_memory import check_geometry
from mlflow_safelock.errors import CheckpointError
from mlflow_safelock.lock import SafetyLock


def save_locked_checkpoint(
    source_dir: str | os.PathLike[str],
    dest_dir: str | os.PathLike[str],
    lock: SafetyLock,
    alpha: float = 6.0,
    *,
    verify: Verify = "auto",
    sharing: Literal["link", "copy"] = "link",
    progress: Progress = silent,
    require_effect: bool = False,
) -> CheckpointReport:
    """Write a locked copy of a fine-tune that stock ``transformers`` loads, locked, from its folder alone.

    The biases ``W_o v`` are stored in the checkpoint, and the configuration asks for them. Only the columns
    of locked heads are read, and files of weights that do not change are shared with the source where the
    filesystem can: the folder costs almost nothing. It appears only once it was confirmed; if anything
    fails, nothing is left. The source is only read.

    Args:
        source_dir: The unlocked fine-tune: a folder that ``save_pretrained`` wrote, or the folder of a model
            that ``mlflow.transformers`` logged.
        dest_dir: The folder to write. It must not exist; its parent must.
        lock: A lock of the fine-tune's base.
        alpha: Strength; negative pushes the other way, and the model card and configuration say so.
        verify: How it is confirmed. ``reload``: stock ``transformers`` loads it and gives the logits of the
            source with the lock applied in memory, which takes memory for both. ``structure``: every byte
            that is not the lock's is the source's, and ``transformers`` builds a model that has the biases;
            under 500 MB of memory whatever the model's size. ``auto``: reload if the weights are no larger
            than 8 GB and memory suffices, else structure.
        sharing: ``link``: weights are shared as reflinks where the filesystem has them, else as hard links,
            else copied. A hard link is the same file: what is edited *in place* in one folder changes in the
            other. ``copy``: the folder is independent, and costs as much as the source.
        progress: Is told how many bytes of the weights are in their place, and of how many.
        require_effect: Whether to refuse a fine-tune in which less than half of the push arrives, in some
            layer, that the lock makes in its base. That is told of locks with unit biases only.

    Returns:
        What was written, and how it was confirmed.

    Raises:
        AlphaError: Alpha is not a finite number other than zero, or too large for the weights' dtype.
        AlreadyLockedError: The source carries a lock.
        CheckpointError: The source cannot be read or is of a kind that cannot be locked, the folder cannot be
            written, the source changed meanwhile, or the folder could not be confirmed.
        LockMismatchError: The lock is for another attention shape.
        LockWithoutEffectError: Too little of the push arrives, where that is asked.
        UnsupportedArchitectureError: No checkpoint of this architecture can hold the biases.
    """
    strength = checked_alpha(alpha)
    checked_verify(verify)
    share = way_of(sharing)
    source_folder, folder = Path(source_dir), Path(dest_dir)
    check_destination(folder)
    before = stamps_of(source_folder)
    source = read_source(source_folder)
    if folder.resolve().is_relative_to(source_folder.resolve()):
        raise CheckpointError(
            f"{folder} lies in the source {source_folder}.", next_step="Name another folder."
        )
    used = set(_files_of(source))
    check_geometry(lock, source.geometry, str(source_folder))
    biases = biases_of(source, lock, strength)
    if require_effect:
        check_effect(biases.pushes, lock, strength, f"the fine-tune at {source_folder}")
    with written_aside(folder) as beside:
        meter = Meter("Weights", source.weights.size, progress)
        written = write_weights(source.weights, biases, beside, share, meter.add)
        _write_small_files(source, lock, strength, beside)
        write_record(source, written, lock, strength, beside)
        confirmation = confirm(verify, source, written, biases, beside, lock, strength)
        refuse_changed(before, sorted(used | set(_files_of(source))))
        sizes = {
            str(path.relative_to(beside)): path.stat().st_size for path in beside.rglob("*") if path.is_file()
        }
    shared = {file.name: file.sharing for file in written}
    return CheckpointReport(
        folder=folder,
        files=tuple(sorted(sizes)),
        left_out=_left_out(source),
        carrier=carrier_in_words(source),
        biases=len(biases.layers),
        lock=lock.digest,
        alpha=strength,
        check=confirmation.check,
        max_logit_difference=confirmation.max_logit_difference,
        max_logit_change=confirmation.max_logit_change,
        verified=confirmation.kind,
        weights=written,
        shared=shared,
        bytes_written=sum(size for name, size in sizes.items() if shared.get(name, "copy") == "copy"),
        bias_error=biases.error,
    )


def _write_small_files(source: CheckpointSource, lock: SafetyLock, alpha: float, folder: Path) -> None:
    """Write everything that is neither weights nor their index."""
    values = locked_values(source, lock, alpha)
    for name, path in source.layout.carried.items():
        own_file(path, folder / name)
    _write_text(folder / "config.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    _write_text(folder / "README.md", locked_card(source.layout.card, lock, alpha))
    if _tokenizer_may_change(source, values["model_type"]):
        keep_tokenizer(source.layout, folder)


def _files_of(source: CheckpointSource) -> Iterator[Path]:
    """Every file of the source that something of the locked checkpoint comes from."""
    yield source.layout.model / "config.json"
    yield from (source.layout.model / name for name in source.weights.files)
    yield from source.layout.carried.values()
    optional = (source.layout.model / name for name in (INDEX_FILE, "README.md"))
    yield from (path for path in optional if path.is_file())


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
