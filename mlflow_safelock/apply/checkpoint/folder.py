"""A folder that appears only when it is complete."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow_safelock.errors import CheckpointError


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Give a new folder beside ``folder`` to write to, and rename it once the block is done.

    What was written is on the disk before the folder has its name. If the block raises, nothing is left.

    Raises:
        CheckpointError: ``folder`` exists, its parent does not, or the disk refuses something.
    """
    check_destination(folder)
    # A name may have 255 bytes, and a character several.
    name = folder.name.encode()[:64].decode(errors="ignore")
    beside = folder.parent / f".{name}.{secrets.token_hex(8)}.tmp"
    try:
        beside.mkdir()
        yield beside
        _reach_the_disk(beside)
        check_destination(folder)
        beside.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written: {error}.",
            next_step="Check permissions and free space.",
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_destination(folder: Path) -> None:
    """Raise CheckpointError if a folder cannot be made there."""
    if "\0" in str(folder) or str(folder) != str(folder).encode(errors="replace").decode():
        raise CheckpointError(
            f"{str(folder)!r} is no path for a folder: there is a NUL in it, or it is not UTF-8.",
            next_step="Name another.",
        )
    if os.path.lexists(folder):
        raise CheckpointError(f"{folder} exists already.", next_step="Name a new folder, or remove that one.")
    if not folder.parent.is_dir():
        raise CheckpointError(f"There is no folder {folder.parent}.", next_step="Create it first.")


def _reach_the_disk(folder: Path) -> None:
    """Wait until everything below a folder is on the disk, but for hard links, which hold nothing new."""
    for path in folder.rglob("*"):
        if path.is_dir() or path.stat().st_nlink == 1:
            _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
