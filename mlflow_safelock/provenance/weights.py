"""The header of a safetensors weights file, read where it lies."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from mlflow_safelock.errors import SourceError
from mlflow_safelock.provenance.artifacts import ArtifactReader, Span

MAX_HEADER_BYTES = 100 << 20
"""Longest header that safetensors itself accepts."""


@dataclass(frozen=True)
class WeightsHeader:
    """Where the tensors of a safetensors file are.

    Attributes:
        size: Bytes before the first tensor.
        tensors: Span of each tensor in the file, by name.
    """

    size: int
    tensors: Mapping[str, Span]


def read_header(reader: ArtifactReader, path: str) -> WeightsHeader:
    """Read the header of the safetensors file ``path`` and nothing else of it.

    Raises:
        SourceError: The file is not safetensors, or its header points beyond its end.
    """
    size = next((file.size for file in reader.files() if file.path == path), 0)
    where = f"The file {path!r} at {reader.location}"
    if size < 8:
        raise SourceError(f"{where} is not a safetensors file: it has {size} bytes.")
    (length,) = struct.unpack("<Q", reader.read(path, 0, 8))
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise SourceError(f"{where} is not a safetensors file, or it is cut off.")
    start = 8 + length
    try:
        offsets = {
            name: entry["data_offsets"]
            for name, entry in json.loads(reader.read(path, 8, length)).items()
            if name != "__metadata__"
        }
        tensors = {name: (start + begin, end - begin) for name, (begin, end) in offsets.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{where} has a header that cannot be read.") from error
    if any(begin < start or length < 0 or begin + length > size for begin, length in tensors.values()):
        raise SourceError(f"{where} has a header that points beyond the file's end: the file is cut off.")
    return WeightsHeader(start, tensors)
