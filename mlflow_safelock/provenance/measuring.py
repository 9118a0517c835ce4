"""Every byte of a fine-tune: its full fingerprint, taken where there is time, compared where it is served.

A full fingerprint is a sampled one with the digest over all bytes of each file. Whoever reads all of it
anyway, such as the loader, compares every byte; whoever must be quick compares the blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Protocol

from mlflow_safelock.apply.checkpoint.progress import Meter, Progress, silent
from mlflow_safelock.provenance.artifacts import ArtifactFile, ArtifactReader, Span
from mlflow_safelock.provenance.fingerprint import (
    FileFingerprint,
    SourceFingerprint,
    changed,
    check_fingerprint,
    for_each,
    take_fingerprint,
)

_logger = logging.getLogger(__name__)

PIECE_BYTES = 8 << 20
"""How much is requested at once."""

PIECES_HELD = 2
"""How many pieces of one file are held in memory."""


class Kept(Protocol):
    """Digests of files that were read before a measuring was cut off."""

    def digest_of(self, file: ArtifactFile) -> str | None:
        """The digest of a file, where it was read and is the same since."""

    def keep(self, file: ArtifactFile, digest: str) -> None:
        """Keep the digest of a file that was read to its end."""


class KeptNowhere:
    """For a measuring that starts from the beginning when it is done again."""

    def digest_of(self, _file: ArtifactFile) -> str | None:
        """None."""

    def keep(self, _file: ArtifactFile, _digest: str) -> None:
        """Nothing."""


class KeptOnDisk:
    """Digests in a file of this user's, a line for each file of the source that was read to its end.

    A file of the source is the same as long as its store gives it the same ETag, or its file system the same
    size and time of change; where there is neither, it is read again. They lie on this machine and not beside
    the source, where others may write. If they cannot be kept, a measuring starts from the beginning.

    Args:
        file: The file.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._writing = threading.Lock()
        self._digests: dict[str, str] = {}
        try:
            lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        except (OSError, ValueError) as error:
            _logger.warning("What was measured before is not known: %s", error)
            lines = []
        for line in lines:
            # A line may be half a line, of a process that died.
            with contextlib.suppress(ValueError, TypeError):
                state, digest = json.loads(line)
                self._digests[state] = digest

    def digest_of(self, file: ArtifactFile) -> str | None:
        """The digest of a file, where it was read and is the same since."""
        return self._digests.get(state_of(file) or "")

    def keep(self, file: ArtifactFile, digest: str) -> None:
        """Keep the digest of a file that was read to its end."""
        state = state_of(file)
        if state is None:
            return
        try:
            with self._writing:
                self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with self._file.open("a", encoding="utf-8") as stream:
                    stream.write(f"\n{json.dumps([state, digest])}")
        except OSError as error:
            _logger.warning("What was measured cannot be kept: %s", error)

    def forget(self) -> None:
        """Delete the file, once the measuring is done."""
        self._file.unlink(missing_ok=True)


def state_of(file: ArtifactFile) -> str | None:
    """What changes whenever a file does; ``None`` where there is nothing of that kind."""
    if file.checksum is None and file.changed is None:
        return None
    return json.dumps([file.path, file.size, file.checksum and file.checksum.etag, file.changed])


def measure(
    reader: ArtifactReader, kept: Kept | None = None, progress: Progress = silent
) -> SourceFingerprint:
    """Read every byte of the model folder behind ``reader``.

    Args:
        reader: The folder.
        kept: What is known from a measuring that was cut off.
        progress: Is told how many bytes were read, and of how many.

    Raises:
        SourceError: The folder is empty, or something in it cannot be read.
        VerificationError: Something in it was changed meanwhile.
    """
    known = kept or KeptNowhere()
    sampled = take_fingerprint(reader)
    listed = {file.path: file for file in reader.files()}
    meter = Meter("Reading every byte", sampled.size, progress)

    def with_digest(file: FileFingerprint) -> FileFingerprint:
        found = listed[file.path]
        digest = known.digest_of(found)
        if digest is None:
            digest = _digest_of(reader, file, meter.add)
            known.keep(found, digest)
        else:
            meter.add(file.size)
        return file.model_copy(update={"whole": digest})

    full = SourceFingerprint(files=tuple(for_each(reader, sampled.files, with_digest)))
    check_fingerprint(sampled, reader)
    return full


def check_every_byte(
    fingerprint: SourceFingerprint, reader: ArtifactReader, *, others: Collection[str] = ()
) -> None:
    """Compare as ``check_fingerprint`` does, and all bytes of each file whose digest the fingerprint has.

    Args:
        fingerprint: The fingerprint; of a sampled one the blocks are compared.
        reader: The folder.
        others: Paths of files that may be there and are not compared.

    Raises:
        VerificationError: A file is missing, new, of another size or of other bytes; the message names it.
        SourceError: The folder cannot be read.
    """
    check_fingerprint(fingerprint, reader, others=others)
    measured = [file for file in fingerprint.files if file.whole is not None]

    def is_same(file: FileFingerprint) -> bool:
        return _digest_of(reader, file) == file.whole

    for file, same in zip(measured, for_each(reader, measured, is_same), strict=True):
        if not same:
            raise changed(reader, file.path, "has other bytes than when it was measured")


def pieces_of(size: int) -> Iterator[Span]:
    """A file from its beginning to its end, in pieces."""
    return ((start, min(PIECE_BYTES, size - start)) for start in range(0, size, PIECE_BYTES))


def read_whole(reader: ArtifactReader, path: str, size: int) -> Iterator[tuple[Span, bytes]]:
    """Every piece of a file, in order, with its place."""
    pieces = list(pieces_of(size))
    for first in range(0, len(pieces), PIECES_HELD):
        held = pieces[first : first + PIECES_HELD]
        yield from zip(held, reader.read_many(path, held), strict=True)


def _digest_of(
    reader: ArtifactReader, file: FileFingerprint, count: Callable[[int], None] | None = None
) -> str:
    state = hashlib.sha256()
    for _, data in read_whole(reader, file.path, file.size):
        state.update(data)
        if count is not None:
            count(len(data))
    return state.hexdigest()


def kept_digests(location: str) -> KeptOnDisk:
    """What this user's cache folder keeps of the measuring of the model at ``location``."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlflow-safelock/measuring"
    return KeptOnDisk(folder / f"{hashlib.sha256(location.encode()).hexdigest()[:32]}.jsonl")
