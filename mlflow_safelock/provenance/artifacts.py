"""Reading a folder of artifacts wherever it is, a part of a file at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from mlflow_safelock.errors import SourceError

Span = tuple[int, int]
"""Part of a file: first byte and number of bytes."""

MAX_READ_BYTES = 1 << 30
"""Most bytes that one system call is asked for; Linux gives no more than 2 GiB."""


class StoreChecksum(BaseModel):
    """What an object store itself says of the bytes of one file.

    Attributes:
        etag: The object's entity tag; the store changes it whenever it gets other bytes.
        version_id: Version of the object, where its bucket keeps versions.
        sha256: SHA-256 as the store writes it (base64; ``…-N`` over N parts), where it holds one.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    etag: str
    version_id: str | None = None
    sha256: str | None = None

    def differs_from(self, other: StoreChecksum) -> bool:
        """Whether the two speak of different bytes; a version alone may differ, as a copy's does."""
        if self.sha256 is not None and other.sha256 is not None:
            return self.sha256 != other.sha256
        return self.etag != other.etag


@dataclass(frozen=True)
class ArtifactFile:
    """One file of an artifact folder.

    Attributes:
        path: Path inside the folder, with forward slashes.
        size: Size in bytes.
        checksum: What the store says of its bytes; ``None`` where it says nothing.
        changed: When the file system says that it was changed last, in nanoseconds; ``None`` elsewhere. Its
            times, owner and links count, too.
        modified: When its bytes were written last, as far as that was not set by hand; likewise.
    """

    path: str
    size: int
    checksum: StoreChecksum | None = None
    changed: int | None = field(default=None, compare=False)
    modified: int | None = field(default=None, compare=False)


class ArtifactReader(Protocol):
    """A folder of artifacts that can be listed and read in parts."""

    @property
    def location(self) -> str:
        """Where the folder is, for messages."""

    @property
    def parallel_files(self) -> int:
        """How many files it pays to read at once; 1 where nothing has to be waited for."""

    @property
    def reads_parts(self) -> bool:
        """Whether a part of a file is read without the rest of it."""

    def files(self) -> tuple[ArtifactFile, ...]:
        """Every file below the folder, sorted by path.

        Raises:
            SourceError: The folder does not exist or cannot be listed.
        """

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of one file from ``start``, ``length`` of them or up to its end.

        Raises:
            SourceError: The file cannot be read, or ends before ``start + length``.
        """

    def read_many(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of several parts of one file, in the order asked for.

        Raises:
            SourceError: The file cannot be read, or ends within one of the parts.
        """


@dataclass(frozen=True)
class LocalArtifacts:
    """An artifact folder on this machine's file system."""

    folder: Path

    @property
    def location(self) -> str:
        """The folder's path."""
        return str(self.folder)

    @property
    def parallel_files(self) -> int:
        """One: threads would cost more than they save."""
        return 1

    @property
    def reads_parts(self) -> bool:
        """Yes."""
        return True

    def files(self) -> tuple[ArtifactFile, ...]:
        """Every file below the folder, links to files and folders followed, sorted by path."""
        if not self.folder.is_dir():
            raise SourceError(f"There is no folder at {self.folder}.")
        try:
            return tuple(sorted(_files_below(str(self.folder), "", ()), key=lambda file: file.path))
        except OSError as error:
            raise SourceError(f"The folder {self.folder} cannot be listed: {error}.") from error

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of one file from ``start``, ``length`` of them or up to its end."""
        if length is not None:
            return self.read_many(path, ((start, length),))[0]
        target = self.folder / path
        try:
            with target.open("rb") as stream:
                stream.seek(start)
                return stream.read()
        except OSError as error:
            raise _unreadable(target, error) from error

    def read_many(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of several parts of one file, which is opened once."""
        target = self.folder / path
        try:
            descriptor = os.open(target, os.O_RDONLY)
            try:
                return [_read_span(descriptor, target, *span) for span in spans]
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _unreadable(target, error) from error


def _files_below(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[ArtifactFile]:
    """The files of a folder and of those in it, but of no folder that links to one ``above`` it."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files_below(entry.path, f"{prefix}{entry.name}/", (*above, identity))
            elif entry.is_file():
                found = entry.stat()
                yield ArtifactFile(
                    prefix + entry.name,
                    found.st_size,
                    changed=found.st_ctime_ns,
                    modified=found.st_mtime_ns,
                )


def _read_span(descriptor: int, target: Path, start: int, length: int) -> bytes:
    parts, position, end = [], start, start + length
    while position < end:
        part = os.pread(descriptor, min(end - position, MAX_READ_BYTES), position)
        if not part:
            raise SourceError(
                f"The file {target} ends at byte {position}, before {end}: it is cut off, or it was changed "
                "while it was read.",
                next_step="Copy the model anew, or register the changed one as a new version.",
            )
        parts.append(part)
        position += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _unreadable(target: Path, error: OSError) -> SourceError:
    return SourceError(f"The file {target} cannot be read: {error}.")
