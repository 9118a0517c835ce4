"""Reading a folder of artifacts wherever it is, a part of a file at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlflow_safelock.errors import SourceError

Span = tuple[int, int]
"""Part of a file: first byte and number of bytes."""


@dataclass(frozen=True, order=True)
class ArtifactFile:
    """One file of an artifact folder.

    Attributes:
        path: Path inside the folder, with forward slashes.
        size: Size in bytes.
    """

    path: str
    size: int


class ArtifactReader(Protocol):
    """A folder of artifacts that can be listed and read in parts."""

    @property
    def location(self) -> str:
        """Where the folder is, for messages."""

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


@dataclass(frozen=True)
class LocalArtifacts:
    """An artifact folder on this machine's file system."""

    folder: Path

    @property
    def location(self) -> str:
        """The folder's path."""
        return str(self.folder)

    def files(self) -> tuple[ArtifactFile, ...]:
        """Every file below the folder, links followed, sorted by path."""
        if not self.folder.is_dir():
            raise SourceError(f"There is no folder at {self.folder}.")
        try:
            return tuple(
                sorted(
                    ArtifactFile(path.relative_to(self.folder).as_posix(), path.stat().st_size)
                    for path in self.folder.rglob("*")
                    if path.is_file()
                )
            )
        except OSError as error:
            raise SourceError(f"The folder {self.folder} cannot be listed: {error}.") from error

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of one file from ``start``, ``length`` of them or up to its end."""
        target = self.folder / path
        try:
            with target.open("rb") as stream:
                stream.seek(start)
                data = stream.read() if length is None else stream.read(length)
        except OSError as error:
            raise SourceError(f"The file {target} cannot be read: {error}.") from error
        if length is not None and len(data) != length:
            raise SourceError(f"The file {target} ends at byte {start + len(data)}, before {start + length}.")
        return data
