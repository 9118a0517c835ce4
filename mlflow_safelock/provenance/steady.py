"""A folder that stays for its reader as it was looked at first, whoever writes to it meanwhile."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from tempfile import SpooledTemporaryFile

from mlflow_safelock.errors import SourceError
from mlflow_safelock.provenance.artifacts import ArtifactFile, ArtifactReader, Span

KEPT_IN_MEMORY_BYTES = 16 << 20


class ListedArtifacts:
    """A folder that is listed once, however often one piece of work asks what is in it."""

    def __init__(self, reader: ArtifactReader) -> None:
        """Look at the folder behind ``reader``, which is not listed yet."""
        self._reader = reader

    @property
    def location(self) -> str:
        """Where the folder is, for messages."""
        return self._reader.location

    @property
    def parallel_files(self) -> int:
        """How many files it pays to read at once."""
        return self._reader.parallel_files

    @property
    def reads_parts(self) -> bool:
        """Whether a part of a file is read without the rest of it."""
        return self._reader.reads_parts

    def files(self) -> tuple[ArtifactFile, ...]:
        """Every file below the folder when it was listed first, sorted by path."""
        return tuple(self._listing.values())

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of one file, as they are now."""
        return self._reader.read(path, start, length)

    def read_many(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of several parts of one file, as they are now."""
        return self._reader.read_many(path, spans)

    @cached_property
    def _listing(self) -> dict[str, ArtifactFile]:
        return {file.path: file for file in self._reader.files()}


class SteadyArtifacts(ListedArtifacts):
    """A folder of which two looks agree: what was read once is not read anew.

    The listing is kept, and so is what ``read`` gave, beyond some megabytes in a temporary file.
    ``read_many`` keeps nothing, and gives of what is kept the same bytes. So a digest of the folder that is
    made after something was found out about it by ``read`` is one of the bytes that were looked at.
    """

    def __init__(self, reader: ArtifactReader) -> None:
        """Look at the folder behind ``reader``, of which nothing is read yet."""
        super().__init__(reader)
        self._kept: dict[str, list[tuple[int, int, int]]] = {}
        self._bytes = SpooledTemporaryFile(max_size=KEPT_IN_MEMORY_BYTES)  # noqa: SIM115 - open while this is
        weakref.finalize(self, self._bytes.close)
        self._lock = threading.Lock()

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of one file from ``start``, ``length`` of them or up to the end that it had when listed.

        Raises:
            SourceError: There was no such file, it cannot be read, or ends before ``start + length``.
        """
        if path not in self._listing:
            raise SourceError(f"There is no file {path!r} at {self.location}.")
        wanted = max(0, self._listing[path].size - start) if length is None else length
        (data,) = self.read_many(path, ((start, wanted),))
        with self._lock:
            place = self._bytes.seek(0, 2)
            self._bytes.write(data)
            self._kept.setdefault(path, []).append((start, len(data), place))
        return data

    def read_many(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of several parts of one file, those that were read before as they were then."""
        found = []
        for (start, length), data in zip(spans, self._reader.read_many(path, spans), strict=True):
            steady = bytearray(data)
            for begin, kept in self._kept_within(path, start, length):
                steady[begin - start : begin - start + len(kept)] = kept
            found.append(bytes(steady))
        return found

    def _kept_within(self, path: str, start: int, length: int) -> Iterator[tuple[int, bytes]]:
        """What is kept of a part of a file, and where that begins in the file."""
        with self._lock:
            for kept_start, kept_length, place in self._kept.get(path, []):  # where two overlap they agree
                begin = max(start, kept_start)
                end = min(start + length, kept_start + kept_length)
                if begin < end:
                    self._bytes.seek(place + begin - kept_start)
                    yield begin, self._bytes.read(end - begin)
