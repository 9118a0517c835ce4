"""A folder that appears only when it is complete."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow_safelock.errors import CheckpointError

_CHUNK = 1 << 30


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Give a new folder beside ``folder`` to write to, and rename it once the block is done.

    If the block raises, nothing is left of it.

    Raises:
        CheckpointError: ``folder`` exists, its parent does not, or the disk refuses something.
    """
    check_destination(folder)
    beside = folder.parent / f".{folder.name[:64]}.{secrets.token_hex(8)}.tmp"
    try:
        beside.mkdir()
        yield beside
        check_destination(folder)
        beside.rename(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written: {error}.",
            next_step="Check permissions and free space.",
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_destination(folder: Path) -> None:
    """Raise CheckpointError if a folder cannot be made there."""
    if os.path.lexists(folder):
        raise CheckpointError(f"{folder} exists already.", next_step="Name a new folder, or remove that one.")
    if not folder.parent.is_dir():
        raise CheckpointError(f"There is no folder {folder.parent}.", next_step="Create it first.")


def copy_file(source: Path, destination: Path) -> None:
    """Copy a file's bytes, by sharing blocks where the filesystem can.

    A copy on purpose, never a hard link: a link would change whenever the source is edited, and this folder
    is what was checked.
    """
    destination.parent.mkdir(exist_ok=True)
    with source.open("rb") as reader, destination.open("xb") as writer:
        if not _shared_copy(reader.fileno(), writer.fileno()):
            shutil.copyfileobj(reader, writer, 1 << 20)


def _shared_copy(reader: int, writer: int) -> bool:
    """Let the kernel copy, which shares blocks on filesystems such as XFS and Btrfs. False if it cannot."""
    copied = 0
    size = os.fstat(reader).st_size
    while hasattr(os, "copy_file_range") and copied < size:
        try:
            step = os.copy_file_range(reader, writer, min(_CHUNK, size - copied))
        except OSError:
            if copied:
                raise
            return False
        if step == 0:
            raise OSError("the source became shorter while it was copied")
        copied += step
    return copied == size
