"""The header of a safetensors weights file, read where it lies."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from types import MappingProxyType

from mlflow_safelock.errors import SourceError
from mlflow_safelock.provenance.artifacts import ArtifactReader, Span

MAX_HEADER_BYTES = 100 << 20
"""Longest header that safetensors itself accepts."""

KEPT_HEADER_BYTES = 32 << 10
"""Length of headers that are not parsed anew for every file that has the same."""

USUAL_HEADER_BYTES = 64 << 10
"""How much of a file is read at first; the header of most fits, and is then there in one read."""


@dataclass(frozen=True)
class WeightsHeader:
    """Where the tensors of a safetensors file are.

    Attributes:
        size: Bytes before the first tensor.
        tensors: Span of each tensor in the file, by name.
        kinds: Type, as safetensors calls it, and shape of each, by name.
    """

    size: int
    tensors: Mapping[str, Span]
    kinds: Mapping[str, tuple[str, tuple[int, ...]]]


def read_header(reader: ArtifactReader, path: str, size: int | None = None) -> WeightsHeader:
    """Read the header of the safetensors file ``path`` and, at most, a few kilobytes after it.

    Args:
        reader: The folder.
        path: The file's path in it.
        size: The file's size in bytes, where it is known; otherwise the folder is listed.

    Raises:
        SourceError: The file is not safetensors, or its header points beyond its end.
    """
    if size is None:
        size = next((file.size for file in reader.files() if file.path == path), 0)
    where = f"The file {path!r} at {reader.location}"
    if size < 8:
        raise SourceError(f"{where} is not a safetensors file: it has {size} bytes.")
    beginning = reader.read(path, 0, min(size, USUAL_HEADER_BYTES))
    (length,) = struct.unpack_from("<Q", beginning)
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise SourceError(f"{where} is not a safetensors file, or it is cut off.")
    start = 8 + length
    if start > len(beginning):
        beginning += reader.read(path, len(beginning), start - len(beginning))
    try:
        header = beginning[8:start]
        tensors, kinds = _kept_entries(header) if length <= KEPT_HEADER_BYTES else _entries(header)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{where} has a header that cannot be read.") from error
    if any(begin < start or length < 0 or begin + length > size for begin, length in tensors.values()):
        raise SourceError(f"{where} has a header that points beyond the file's end: the file is cut off.")
    return WeightsHeader(start, tensors, kinds)


_Entries = tuple[Mapping[str, Span], Mapping[str, tuple[str, tuple[int, ...]]]]


def _entries(header: bytes) -> _Entries:
    """The spans of the tensors in a file with this header, and their types and shapes."""
    entries, start = json.loads(header), 8 + len(header)
    entries.pop("__metadata__", None)
    offsets = {name: entry["data_offsets"] for name, entry in entries.items()}
    tensors = {
        name: (start + index(begin), index(end) - index(begin)) for name, (begin, end) in offsets.items()
    }
    kinds = {
        name: (str(entry["dtype"]), tuple(index(size) for size in entry["shape"]))
        for name, entry in entries.items()
    }
    return MappingProxyType(tensors), MappingProxyType(kinds)


@lru_cache(maxsize=64)
def _kept_entries(header: bytes) -> _Entries:
    """The same for whoever reads the same header next: a promotion does, and so do a base's fine-tunes."""
    return _entries(header)
