"""Giving a file a second place, at the price of a directory entry where the filesystem allows it.

A reflink shares the blocks of a file until one of the two is written to, so both stay independent. A hard
link is the same file under another name: whoever edits one in place edits the other. Both cost nothing,
whatever the size. A copy is what is left.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from mlflow_safelock.errors import CheckpointError

Sharing = Literal["reflink", "hard link", "copy"]
"""How a file came to its second place."""

_CHUNK = 1 << 30
_FICLONE = 0x40049409
# What the kernel answers where it cannot share, as opposed to a disk that is full or broken.
_CANNOT_SHARE = frozenset(
    {
        errno.EXDEV,
        errno.EPERM,
        errno.EACCES,
        errno.EMLINK,
        errno.EINVAL,
        errno.ENOSYS,
        errno.ENOTTY,
        errno.EOPNOTSUPP,
        errno.ETXTBSY,
    }
)


def share_file(source: Path, destination: Path) -> Sharing:
    """Give a file a second place: by reflink, else by hard link, else by copying it.

    Args:
        source: The file. Where it is a symbolic link, the file that it leads to.
        destination: Where it goes; nothing may be there.
    """
    real = source.resolve(strict=True)
    destination.parent.mkdir(exist_ok=True)
    if _reflinked(real, destination):
        return "reflink"
    if _hard_linked(real, destination):
        return "hard link"
    return _copied(real, destination)


def own_file(source: Path, destination: Path) -> Sharing:
    """Give a file a second place that may be written to without touching the first: by reflink, or a copy.

    Args:
        source: The file. Where it is a symbolic link, the file that it leads to.
        destination: Where it goes; nothing may be there.
    """
    real = source.resolve(strict=True)
    destination.parent.mkdir(exist_ok=True)
    return "reflink" if _reflinked(real, destination) else _copied(real, destination)


def way_of(sharing: str) -> Callable[[Path, Path], Sharing]:
    """How files are put into another folder.

    Raises:
        CheckpointError: It is none of the ways.
    """
    if sharing not in _WAYS:
        raise CheckpointError(f"sharing is {sharing!r}.", next_step=f"Use one of: {', '.join(_WAYS)}.")
    return _WAYS[sharing]


def _reflinked(source: Path, destination: Path) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    with source.open("rb") as reader, destination.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError as error:
            destination.unlink()
            if error.errno in _CANNOT_SHARE:
                return False
            raise
    return True


def _hard_linked(source: Path, destination: Path) -> bool:
    try:
        os.link(source, destination)
    except OSError as error:
        if error.errno in _CANNOT_SHARE:
            return False
        raise
    return True


def _copied(source: Path, destination: Path) -> Sharing:
    with source.open("rb") as reader, destination.open("xb") as writer:
        if not _copied_by_the_kernel(reader.fileno(), writer.fileno()):
            shutil.copyfileobj(reader, writer, 1 << 20)
    return "copy"


def _copied_by_the_kernel(reader: int, writer: int) -> bool:
    """Copy without taking the bytes through this process. False where the kernel does not do that."""
    copied = 0
    size = os.fstat(reader).st_size
    while hasattr(os, "copy_file_range") and copied < size:
        try:
            step = os.copy_file_range(reader, writer, min(_CHUNK, size - copied))
        except OSError as error:
            if copied == 0 and error.errno in _CANNOT_SHARE:
                return False
            raise
        if step == 0:
            raise OSError("the source became shorter while it was copied")
        copied += step
    return copied == size


_WAYS: Mapping[str, Callable[[Path, Path], Sharing]] = {"link": share_file, "copy": own_file}
