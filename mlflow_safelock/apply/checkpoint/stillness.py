"""Whether a source stayed the same while it was read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow_safelock.errors import CheckpointError


@dataclass(frozen=True)
class Stamp:
    """What changes when a file is edited or replaced; a new hard link to it changes none of it.

    Attributes:
        device: Filesystem of the file.
        inode: Its number there.
        size: Bytes.
        modified: Time of the last change of its bytes, in nanoseconds.
    """

    device: int
    inode: int
    size: int
    modified: int


def stamps_of(folder: Path) -> dict[Path, Stamp]:
    """The stamp of every file below a folder, by its real path.

    Raises:
        CheckpointError: It cannot be listed.
    """
    try:
        paths = list(folder.rglob("*"))
        # Of a folder that is a link, such as one of chat templates, what is in it.
        paths += [inner for path in paths if path.is_symlink() and path.is_dir() for inner in path.iterdir()]
        stamps = (stamp_of(path) for path in paths)
        return dict(found for found in stamps if found is not None)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(folder)!r} cannot be read: {error}.", next_step="Name a folder that this process may read."
        ) from error


def stamp_of(path: Path) -> tuple[Path, Stamp] | None:
    """The real path of a file and its stamp; ``None`` where there is no file."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return None
    if not real.is_file():
        return None
    status = real.stat()
    return real, Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def refuse_changed(before: Mapping[Path, Stamp], paths: Iterable[Path]) -> None:
    """Raise CheckpointError if one of the files is not as it was stamped before."""
    for path in paths:
        now = stamp_of(path)
        if now is None or before.get(now[0]) != now[1]:
            raise CheckpointError(
                f"{path} changed while it was being locked.",
                next_step="Wait until whatever writes the fine-tune is done, then lock it again.",
            )
