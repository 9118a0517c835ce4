"""A fine-tune's fingerprint: enough of its bytes to notice that it was swapped, retrained or re-saved.

Taking one reads every small file whole, and of every large one its beginning and blocks at places drawn at
random when it is taken: one block in each tensor of a safetensors file, spread evenly elsewhere. So the cost
does not grow with the size of the weights, and nobody can know beforehand which bytes will be compared.
Where an object store keeps a checksum of its own, that is recorded too; it is compared with what the same
store says later, and not with a downloaded copy, which has none.

What it catches: a file added, removed, resized or renamed, any change of a small file (configuration,
tokenizer, chat template), and a change of weights that touches more than a few bytes of a tensor. What it
does not catch: an edit of chosen bytes that misses every block. Where that matters, a source is measured
before (``measuring``): then its fingerprint also has a digest over all bytes of each file.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from mlflow_safelock.errors import SourceError, VerificationError
from mlflow_safelock.provenance.artifacts import ArtifactFile, ArtifactReader, Span, StoreChecksum
from mlflow_safelock.provenance.weights import read_header

T = TypeVar("T")
R = TypeVar("R")

WHOLE_FILE_BYTES = 1 << 20
"""Files up to this size are compared whole."""

BLOCK_BYTES = 4096
"""Size of one block of a larger file."""

MAX_BLOCKS = 1024
"""Most blocks that one file gives."""

EVEN_BLOCKS = 64
"""Blocks of a large file that is not safetensors."""

ADDED_BY_CLIENTS = frozenset({"registered_model_meta"})
"""Files that MLflow clients write into a downloaded model; they say nothing about the model."""


class FileFingerprint(BaseModel):
    """Part of one file, and what it hashes to.

    Attributes:
        path: Path inside the model folder.
        size: Size of the whole file in bytes.
        spans: ``(start, length)`` in bytes of what was read, in order.
        sha256: Hexadecimal digest of the spans' bytes, one after the other.
        checksum: What the store said of the whole file; where that is nothing, ``None``, and not in JSON.
        whole: Hexadecimal SHA-256 of the whole file, where every byte of it was read; else not in JSON.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    path: str
    size: int
    spans: tuple[Span, ...]
    sha256: str
    checksum: StoreChecksum | None = None
    whole: str | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As receipts were written before there were these, so that those still read back the same."""
        values: dict[str, Any] = serialize(self)
        absent = {"checksum": self.checksum is None, "whole": self.whole is None}
        return {name: value for name, value in values.items() if not absent.get(name, False)}


class SourceFingerprint(BaseModel):
    """Fingerprint of a model folder: one entry for every file, by path."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    files: tuple[FileFingerprint, ...]

    @property
    def digest(self) -> str:
        """``sha256:…`` over the canonical JSON of the fingerprint."""
        return f"sha256:{hashlib.sha256(self.to_bytes()).hexdigest()}"

    @property
    def is_full(self) -> bool:
        """Whether it has a digest over all bytes of every file."""
        return all(file.whole is not None for file in self.files)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @property
    def known_bytes(self) -> tuple[tuple[str, int, str | None], ...]:
        """Path and size of every file, and the SHA-256 of those that were read whole.

        The same for the same files whenever it is taken; the blocks of larger files are others each time.
        """
        return tuple(
            (file.path, file.size, file.whole or (file.sha256 if file.spans == ((0, file.size),) else None))
            for file in self.files
        )

    def is_of_the_same_bytes(self, other: SourceFingerprint) -> bool:
        """Whether both are full, and of the same files; their blocks may be others."""
        ours, others = ({file.path: file.whole for file in one.files} for one in (self, other))
        return self.is_full and ours == others

    def to_bytes(self) -> bytes:
        """The fingerprint as canonical JSON (RFC 8785)."""
        # Of texts and whole numbers, under names of plain letters, the standard library writes that form as
        # well, and in a tenth of the time: there may be thousands of spans.
        values = self.model_dump(mode="json")
        return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    def of_copies(self, origins: Mapping[str, str]) -> SourceFingerprint:
        """What the fingerprint says of files that are copies of this folder's.

        Args:
            origins: Path in this folder, by path of the copy.

        Raises:
            VerificationError: This folder has no such file.
        """
        known = {file.path: file for file in self.files}
        missing = sorted(set(origins.values()) - known.keys())
        if missing:
            raise VerificationError(f"The fine-tune has no file {missing[0]!r} that this could be a copy of.")
        # A store's checksum depends on how a file was uploaded or copied, and not only on its bytes.
        return SourceFingerprint(
            files=tuple(
                known[origin].model_copy(update={"path": path, "checksum": None})
                for path, origin in sorted(origins.items())
            )
        )


def take_fingerprint(reader: ArtifactReader) -> SourceFingerprint:
    """Fingerprint the model folder behind ``reader`` with blocks drawn now.

    Raises:
        SourceError: The folder is empty, or something in it cannot be read.
    """
    return SourceFingerprint(
        files=tuple(for_each(reader, model_files(reader), lambda file: _take(reader, file)))
    )


def check_fingerprint(
    fingerprint: SourceFingerprint, reader: ArtifactReader, *, others: Collection[str] = ()
) -> None:
    """Compare the model folder behind ``reader`` with a fingerprint taken earlier.

    Args:
        fingerprint: The fingerprint.
        reader: The folder.
        others: Paths of files that may be there and are not compared.

    Raises:
        VerificationError: A file is missing, new, of another size or of other bytes; the message names it.
        SourceError: The folder cannot be read.
    """
    found = {file.path: file for file in _files(reader)}
    expected = {file.path: file for file in fingerprint.files}
    for path in sorted(found.keys() - expected.keys() - set(others)):
        raise changed(reader, path, "was not there when the model was locked")
    for path, before in sorted(expected.items()):
        if path not in found:
            raise changed(reader, path, "is missing")
        now = found[path]
        if now.size != before.size:
            raise changed(reader, path, f"has {now.size} bytes and had {before.size} when it was locked")
        if before.checksum and now.checksum and now.checksum.differs_from(before.checksum):
            raise changed(reader, path, "has another checksum in its store than when the model was locked")
    for path, same in for_each(reader, sorted(expected.items()), lambda item: _is_same(reader, item)):
        if not same:
            raise changed(reader, path)


def model_files(reader: ArtifactReader) -> list[ArtifactFile]:
    """The files of a model's folder, without those that clients add.

    Raises:
        SourceError: There are none, or they cannot be listed.
    """
    files = _files(reader)
    if not files:
        raise SourceError(f"There are no files at {reader.location}.")
    return files


def _files(reader: ArtifactReader) -> list[ArtifactFile]:
    return [file for file in reader.files() if file.path not in ADDED_BY_CLIENTS]


def for_each(reader: ArtifactReader, items: Iterable[T], work: Callable[[T], R]) -> list[R]:
    """The results of ``work`` in order, several at once where reading means waiting."""
    if reader.parallel_files == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(reader.parallel_files) as pool:
        return list(pool.map(work, items))


def _take(reader: ArtifactReader, file: ArtifactFile) -> FileFingerprint:
    spans = spans_to_compare(reader, file.path, file.size)
    return FileFingerprint(
        path=file.path,
        size=file.size,
        spans=spans,
        sha256=hash_spans(reader, file.path, spans),
        checksum=file.checksum,
    )


def _is_same(reader: ArtifactReader, item: tuple[str, FileFingerprint]) -> tuple[str, bool]:
    path, before = item
    return path, hash_spans(reader, path, before.spans) == before.sha256


def changed(
    reader: ArtifactReader, path: str, what: str = "is not what it was when the model was locked"
) -> VerificationError:
    """The error about a file that is not as it was."""
    return VerificationError(
        f"The fine-tune's file {path!r} at {reader.location} {what}.",
        next_step="Register the changed model as a new version and promote that one.",
    )


def hash_spans(reader: ArtifactReader, path: str, spans: Sequence[Span]) -> str:
    """Hexadecimal SHA-256 over parts of a file, one after the other."""
    state = hashlib.sha256()
    for data in reader.read_many(path, spans):
        state.update(data)
    return state.hexdigest()


def spans_to_compare(
    reader: ArtifactReader, path: str, size: int, draw: Callable[[int], int] = secrets.randbelow
) -> tuple[Span, ...]:
    """The parts of a file that are compared: all of a small one, the beginning and blocks of a large one.

    Args:
        reader: The folder.
        path: The file.
        size: Its size in bytes.
        draw: Gives a number of 0 to its argument, which it is not, and decides where blocks are.
    """
    if size <= WHOLE_FILE_BYTES:
        return ((0, size),)
    if path.endswith(".safetensors"):
        header = read_header(reader, path, size)
        tensors = sorted(span for span in header.tensors.values() if span[1])
        step = max(1, -(-len(tensors) // MAX_BLOCKS))
        offset = draw(step)
        blocks = (_random_block(start, length, draw) for start, length in tensors[offset::step])
        return ((0, header.size), *blocks)
    width = size // EVEN_BLOCKS
    return tuple(_random_block(part * width, width, draw) for part in range(EVEN_BLOCKS))


def _random_block(start: int, length: int, draw: Callable[[int], int]) -> Span:
    if length <= BLOCK_BYTES:
        return start, length
    return start + draw(length - BLOCK_BYTES + 1), BLOCK_BYTES
