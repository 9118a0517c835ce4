"""Giving a file a second place, at the price of a directory entry where the filesystem allows it.

A reflink shares the blocks of a file until one of the two is written to, so both stay independent. A hard
link is the same file under another name: whoever edits one in place edits the other. Both cost nothing,
whatever the size. A copy is what is left.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

from mlflow_safelock.errors import CheckpointError

Sharing = Literal["reflink", "hard link", "copy"]
"""How a file came to its second place."""

_CHUNK = 64 << 20
_CHUNK_IN_MEMORY = 1 << 20
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


class Way(Protocol):
    """Gives a file a second place."""

    def __call__(self, source: Path, destination: Path, moved: Callable[[int], None] = ...) -> Sharing:
        """Do it.

        Args:
            source: The file. Where it is a symbolic link, the file that it leads to.
            destination: Where it goes; nothing may be there.
            moved: Is told of bytes that are there, now and then.
        """


def _ignore(_count: int) -> None:
    pass


def share_file(source: Path, destination: Path, moved: Callable[[int], None] = _ignore) -> Sharing:
    """Give a file a second place: by reflink, else by hard link, else by copying it."""
    real = source.resolve(strict=True)
    destination.parent.mkdir(exist_ok=True)
    if _reflinked(real, destination):
        moved(real.stat().st_size)
        return "reflink"
    if _hard_linked(real, destination):
        moved(real.stat().st_size)
        return "hard link"
    return _copied(real, destination, moved)


def own_file(source: Path, destination: Path, moved: Callable[[int], None] = _ignore) -> Sharing:
    """Give a file a second place that may be written to without touching the first: by reflink, or a copy."""
    real = source.resolve(strict=True)
    destination.parent.mkdir(exist_ok=True)
    if _reflinked(real, destination):
        moved(real.stat().st_size)
        return "reflink"
    return _copied(real, destination, moved)


def way_of(sharing: str) -> Way:
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


def _copied(source: Path, destination: Path, moved: Callable[[int], None]) -> Sharing:
    """Copy a file; where it has holes, so has the copy."""
    with source.open("rb") as reader, destination.open("xb") as writer:
        size = os.fstat(reader.fileno()).st_size
        writer.truncate(size)
        place = 0
        for begin, end in _stretches(reader.fileno(), size):
            moved(begin - place)
            place = begin
            while place < end:
                step = _copied_some(reader.fileno(), writer.fileno(), place, min(_CHUNK, end - place))
                if step == 0:
                    raise OSError("the source became shorter while it was copied")
                place += step
                moved(step)
        moved(size - place)
        if os.fstat(reader.fileno()).st_size < size:  # what is gone would pass for a hole
            raise OSError("the source became shorter while it was copied")
    return "copy"


def _stretches(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file holds bytes, and no holes; all of it where the filesystem does not say."""
    end = 0
    while end < size:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        except (AttributeError, OSError) as error:
            if getattr(error, "errno", None) != errno.ENXIO:  # there is nothing but a hole
                yield end, size
            return
        yield begin, min(end, size)


def _copied_some(reader: int, writer: int, place: int, count: int) -> int:
    """Copy some bytes, by the kernel where it does that; how many they were."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(reader, writer, count, place, place)
        except OSError as error:
            if error.errno not in _CANNOT_SHARE:
                raise
    return os.pwrite(writer, os.pread(reader, min(count, _CHUNK_IN_MEMORY), place), place)


_WAYS: Mapping[str, Way] = {"link": share_file, "copy": own_file}
