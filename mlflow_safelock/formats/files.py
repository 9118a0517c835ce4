"""Files at the edge: read no more than a bound, write all or nothing."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from mlflow_safelock.errors import LockError, LockFormatError


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file.

    Args:
        path: The file.
        limit: Most bytes that the file may have; nothing near it is allocated for a larger one.

    Raises:
        LockFormatError: There is no such file, it is no regular file, it cannot be read, or it is too large.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise LockFormatError(
                f"{path} is a directory.", next_step="Give the path of the lock file in it."
            )
        if not stat.S_ISREG(status.st_mode):
            raise LockFormatError(f"{path} is not a regular file.", next_step="Give the path of a lock file.")
        with path.open("rb") as file:
            data = b"" if status.st_size > limit else file.read(limit + 1)
    except FileNotFoundError as error:
        raise LockFormatError(f"There is no file {path}.", next_step="Check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise LockFormatError(
            f"{path} cannot be read: {_reason(error)}.", next_step="Check the path and its permissions."
        ) from error
    if max(status.st_size, len(data)) > limit:
        raise LockFormatError(f"{path} has more than {limit} bytes, and a lock file has fewer.")
    return data


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old bytes or the new ones, whatever happens in between.

    A symlink stays: the file that it leads to is written.

    Raises:
        LockError: The file cannot be written, or something that is no regular file is there, such as a
            directory, a device or a pipe; what was at ``path`` is as it was.
    """
    try:
        target = regular_target(path)
        beside = target.with_name(f".{target.name[:64]}.{secrets.token_hex(8)}.tmp")
        _write_and_rename(beside, target, data)
        _sync_directory(target.parent)
    except (OSError, ValueError) as error:
        raise LockError(
            f"{path} cannot be written: {_reason(error)}.",
            next_step="Check that its folder exists, may be written to, and has space.",
        ) from error


def regular_target(path: Path) -> Path:
    """Where writing to ``path`` may put a regular file: ``path`` itself, or what its symlinks lead to.

    Raises:
        LockError: Something else is there. A rename would replace it: a device is lost to the whole machine.
        OSError: It is not to be told what is there.
        ValueError: It is no path, such as one with a NUL character.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return target
    if not stat.S_ISREG(mode):
        raise LockError(
            f"{path} cannot be written: it is {_kind(mode)} and not a regular file.",
            next_step="Give the path of a file; a new one is made.",
        )
    return target


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFLNK: "a symlink that leads round in a circle",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def _write_and_rename(beside: Path, path: Path, data: bytes) -> None:
    try:
        # Not tempfile: its files are readable by their owner alone, and a lock is to be shared.
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _sync_directory(directory: Path) -> None:
    """Make a rename in the directory last; where directories cannot be opened, it lasts without."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
