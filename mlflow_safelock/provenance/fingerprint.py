"""A fine-tune's fingerprint: enough of its bytes to notice that it was swapped, retrained or re-saved.

Taking one reads every small file whole, and of every large one its beginning and blocks at places drawn at
random when it is taken: one block in each tensor of a safetensors file, spread evenly elsewhere. So the cost
does not grow with the size of the weights, and nobody can know beforehand which bytes will be compared.

What it catches: a file added, removed, resized or renamed, any change of a small file (configuration,
tokenizer, chat template), and a change of weights that touches more than a few bytes of a tensor. What it
does not catch: an edit of chosen bytes that misses every block.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

import rfc8785
from pydantic import BaseModel, ConfigDict

from mlflow_safelock.errors import SourceError, VerificationError
from mlflow_safelock.provenance.artifacts import ArtifactReader, Span
from mlflow_safelock.provenance.weights import read_header

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
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    path: str
    size: int
    spans: tuple[Span, ...]
    sha256: str


class SourceFingerprint(BaseModel):
    """Fingerprint of a model folder: one entry for every file, by path."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    files: tuple[FileFingerprint, ...]

    @property
    def digest(self) -> str:
        """``sha256:…`` over the canonical JSON of the fingerprint."""
        return f"sha256:{hashlib.sha256(rfc8785.dumps(self.model_dump(mode='json'))).hexdigest()}"


def take_fingerprint(reader: ArtifactReader) -> SourceFingerprint:
    """Fingerprint the model folder behind ``reader`` with blocks drawn now.

    Raises:
        SourceError: The folder is empty, or something in it cannot be read.
    """
    files = [file for file in reader.files() if file.path not in ADDED_BY_CLIENTS]
    if not files:
        raise SourceError(f"There are no files at {reader.location}.")
    prints = []
    for file in files:
        spans = _spans(reader, file.path, file.size)
        sha256 = _hash_spans(reader, file.path, spans)
        prints.append(FileFingerprint(path=file.path, size=file.size, spans=spans, sha256=sha256))
    return SourceFingerprint(files=tuple(prints))


def check_fingerprint(fingerprint: SourceFingerprint, reader: ArtifactReader) -> None:
    """Compare the model folder behind ``reader`` with a fingerprint taken earlier.

    Raises:
        VerificationError: A file is missing, new, of another size or of other bytes; the message names it.
        SourceError: The folder cannot be read.
    """
    found = {file.path: file.size for file in reader.files() if file.path not in ADDED_BY_CLIENTS}
    expected = {file.path: file for file in fingerprint.files}
    for path in sorted(found.keys() - expected.keys()):
        raise _changed(reader, path, "was not there when the model was locked")
    for path, file in sorted(expected.items()):
        if path not in found:
            raise _changed(reader, path, "is missing")
        if found[path] != file.size:
            raise _changed(reader, path, f"has {found[path]} bytes and had {file.size} when it was locked")
        if _hash_spans(reader, path, file.spans) != file.sha256:
            raise _changed(reader, path, "is not what it was when the model was locked")


def _changed(reader: ArtifactReader, path: str, what: str) -> VerificationError:
    return VerificationError(
        f"The fine-tune's file {path!r} at {reader.location} {what}.",
        next_step="Register the changed model as a new version and promote that one.",
    )


def _hash_spans(reader: ArtifactReader, path: str, spans: Sequence[Span]) -> str:
    state = hashlib.sha256()
    for start, length in spans:
        state.update(reader.read(path, start, length))
    return state.hexdigest()


def _spans(reader: ArtifactReader, path: str, size: int) -> tuple[Span, ...]:
    if size <= WHOLE_FILE_BYTES:
        return ((0, size),)
    if path.endswith(".safetensors"):
        header = read_header(reader, path)
        tensors = sorted(span for span in header.tensors.values() if span[1])
        step = max(1, -(-len(tensors) // MAX_BLOCKS))
        offset = secrets.randbelow(step)
        blocks = (_random_block(start, length) for start, length in tensors[offset::step])
        return ((0, header.size), *blocks)
    width = size // EVEN_BLOCKS
    return tuple(_random_block(part * width, width) for part in range(EVEN_BLOCKS))


def _random_block(start: int, length: int) -> Span:
    if length <= BLOCK_BYTES:
        return start, length
    return start + secrets.randbelow(length - BLOCK_BYTES + 1), BLOCK_BYTES
