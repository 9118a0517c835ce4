"""Undoing a lock on disk: the source's files, out of a locked checkpoint."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path

from mlflow_safelock.apply.checkpoint.folder import check_destination, written_aside
from mlflow_safelock.apply.checkpoint.record import (
    LockRecord,
    RecordedWeights,
    digest_of,
    read_record,
)
from mlflow_safelock.apply.checkpoint.sample import sampled_digest
from mlflow_safelock.apply.checkpoint.sharing import Way, own_file, way_of
from mlflow_safelock.apply.checkpoint.writing import write_over
from mlflow_safelock.errors import CheckpointError


@dataclass(frozen=True)
class UnlockReport:
    """An unlocked checkpoint that was written.

    Attributes:
        folder: Where it is.
        files: Names of its files.
        lock: Digest of the lock that was undone.
        alpha: Its strength.
    """

    folder: Path
    files: tuple[str, ...]
    lock: str
    alpha: float


def unlock_checkpoint(
    locked_dir: str | os.PathLike[str], dest_dir: str | os.PathLike[str], *, sharing: str = "link"
) -> UnlockReport:
    """Write an unlocked copy of a locked checkpoint, whose files equal the source's byte for byte.

    What the locked checkpoint did not carry, such as the state of a training run, is not there. Files of
    weights cost a directory entry each, except those in which the lock changed something. Small files are
    compared with the source's digests; files of weights with digests of samples of them.

    Args:
        locked_dir: A folder that ``save_locked_checkpoint`` wrote.
        dest_dir: The folder to write. It must not exist; its parent must.
        sharing: ``link`` to share files of weights with the locked checkpoint where the filesystem can, or
            ``copy`` to have files that are independent.

    Raises:
        CheckpointError: The folder is not one that was locked, a file of it is not the one that was written,
            or the copy cannot be written.
    """
    locked, folder = Path(locked_dir), Path(dest_dir)
    share = way_of(sharing)
    check_destination(folder)
    record = _record_of(locked, folder)
    with written_aside(folder) as beside:
        for weights in record.weights:
            _write_weights(weights, locked, beside, share)
        _write_small(record, locked, beside)
        files = tuple(sorted(str(path.relative_to(beside)) for path in beside.rglob("*") if path.is_file()))
    return UnlockReport(folder, files, record.lock, record.alpha)


def _record_of(locked: Path, folder: Path) -> LockRecord:
    try:
        if folder.resolve().is_relative_to(locked.resolve()):
            raise CheckpointError(f"{folder} lies in {locked}.", next_step="Name another folder.")
        return read_record(locked)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{str(locked)!r} cannot be read: {error}.",
            next_step="See that it is a folder, and that this process may read all that is in it.",
        ) from error


def _write_weights(weights: RecordedWeights, locked: Path, folder: Path, share: Way) -> None:
    source, path = locked / weights.locked_name, folder / weights.name
    if not source.is_file():
        raise CheckpointError(f"{source} is missing.", next_step="Copy the locked checkpoint again.")
    place: Way = own_file if weights.changed else share
    place(source, path)
    for change in weights.changed:
        write_over(path, change.begin, _bytes(change.before, source))
    if sampled_digest(path) != weights.sample:
        raise _not_the_one(source)


def _write_small(record: LockRecord, locked: Path, folder: Path) -> None:
    for kept in record.kept:
        path = locked / kept.name
        content = path.read_bytes() if path.is_file() else b""
        if digest_of(content) != kept.sha256:
            raise _not_the_one(path)
        _write(folder / kept.name, content)
    for rewritten in record.rewritten:
        _write(folder / rewritten.name, _bytes(rewritten.content, locked))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def _bytes(text: str, origin: Path) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise CheckpointError(f"The record of {origin} is damaged: {error}.") from error


def _not_the_one(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is not the file that was locked: it was changed afterwards, or is damaged.",
        next_step="Use the fine-tune itself, or copy the locked checkpoint again.",
    )
