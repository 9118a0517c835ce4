"""The header of a safetensors file, checked before anything it describes is touched.

Layout: eight bytes with the header's length (unsigned, little-endian), the header (a JSON object, padded with
spaces), then the tensors' bytes. This project allows less than safetensors does: tensors follow one another
in the order of the header, without gaps or overlaps, and fill the file to its end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_safelock.errors import LockFormatError
from mlflow_safelock.formats.content import known_content
from mlflow_safelock.formats.strict_json import parse_object

MAX_HEADER_BYTES = 1 << 20
"""Longest header that is read or written: far above any lock's, far below what could hurt."""

LENGTH_BYTES = 8
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "I64": 8, "I32": 4}
_DTYPE_CODES = {"<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32"}


@dataclass(frozen=True)
class TensorEntry:
    """What the header says of one tensor.

    Attributes:
        dtype: One of ``ITEM_BYTES``.
        shape: Its dimensions.
        begin: First byte, counted from the end of the header.
        end: The byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """A header in which every tensor lies where it can.

    Attributes:
        metadata: The file's ``__metadata__``.
        tensors: Its tensors, by name, in the order of their bytes.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]


def header_length(data: bytes, origin: str) -> int:
    """The header's length in bytes, once it is known to be sane and inside the file.

    Raises:
        LockFormatError: The file is of another kind, is shorter than its header says, or the header is longer
            than any lock's.
    """
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    # Another kind of file can begin with a believable length, but not with a JSON object after it.
    is_one = length <= MAX_HEADER_BYTES and data[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{"
    if not is_one:
        kind = known_content(data)
        if kind is not None:
            raise LockFormatError(
                f"{origin} is {kind}, not a lock file.",
                next_step="A lock that the method's authors published is read by: safelock lock import.",
            )
    if len(data) < LENGTH_BYTES:
        raise LockFormatError(f"{origin} has {len(data)} bytes and ends before its header begins.")
    if length > MAX_HEADER_BYTES:
        raise LockFormatError(
            f"{origin} claims a header of {length} bytes, and a lock's header has at most {MAX_HEADER_BYTES}."
        )
    if length > len(data) - LENGTH_BYTES:
        raise LockFormatError(
            f"{origin} is cut short: its header should have {length} bytes, "
            f"and {len(data) - LENGTH_BYTES} are there."
        )
    return length


def parse_header(data: bytes, origin: str) -> tuple[dict[str, str], dict[str, Any], int]:
    """Split a file into its metadata, the undecoded description of its tensors, and where their bytes begin.

    Raises:
        LockFormatError: There is no such header, or its ``__metadata__`` is missing or not text.
    """
    length = header_length(data, origin)
    text = data[LENGTH_BYTES : LENGTH_BYTES + length]
    if text.startswith(b"\xef\xbb\xbf"):
        raise LockFormatError(f"The header of {origin} begins with a byte order mark.")
    if not text.startswith(b"{") or not text.rstrip(b" ").endswith(b"}"):
        raise LockFormatError(f"{origin} has no safetensors header: it is no JSON object padded with spaces.")
    tensors = parse_object(text, f"The header of {origin}")
    metadata = tensors.pop("__metadata__", None)
    if metadata is None:
        raise LockFormatError(f"{origin} is a safetensors file without metadata, so it is not a lock.")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LockFormatError(f"The metadata of {origin} must be text only.")
    return metadata, tensors, LENGTH_BYTES + length


def parse_tensors(described: Mapping[str, Any], data_bytes: int, origin: str) -> dict[str, TensorEntry]:
    """Check the header's description of the tensors against the bytes that follow it.

    Args:
        described: The header without its ``__metadata__``.
        data_bytes: Number of bytes after the header.
        origin: Names the file in errors.

    Raises:
        LockFormatError: An entry is not of its form, or the tensors overlap, leave gaps, are out of order,
            reach beyond the file, or do not fill it.
    """
    entries: dict[str, TensorEntry] = {}
    position = 0
    for name, values in described.items():
        entry = _entry(name, values, origin)
        if entry.begin != position:
            problem = "overlaps the one before it" if entry.begin < position else "leaves a gap before it"
            raise LockFormatError(
                f"Tensor {name[:80]!r} of {origin} begins at byte {entry.begin} instead of {position}: it "
                f"{problem}, or the header is out of order."
            )
        if entry.end > data_bytes:
            raise LockFormatError(
                f"{origin} is cut short, or its offsets are wrong: tensor {name[:80]!r} ends at byte "
                f"{entry.end}, and {data_bytes} bytes are there."
            )
        entries[name] = entry
        position = entry.end
    if position != data_bytes:
        raise LockFormatError(f"{origin} has {data_bytes - position} trailing bytes after its last tensor.")
    return entries


def encode_header(metadata: Mapping[str, str], tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The length and header of a file whose tensors follow in the given order.

    Raises:
        LockFormatError: The header would be longer than one that is read back.
    """
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, values in tensors.items():
        described[name] = {
            "dtype": _DTYPE_CODES[values.dtype.newbyteorder("<").str],
            "shape": list(values.shape),
            "data_offsets": [position, position + values.nbytes],
        }
        position += values.nbytes
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of eight bytes
    if len(text) > MAX_HEADER_BYTES:
        raise LockFormatError(
            f"The lock's metadata makes a header of {len(text)} bytes, and {MAX_HEADER_BYTES} are allowed.",
            next_step="Shorten its system prompt or tools.",
        )
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def stored_order(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """The tensors as they follow one another: wider numbers first, so that each is aligned, then by name."""
    names = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    return {name: tensors[name] for name in names}


def _entry(name: str, values: object, origin: str) -> TensorEntry:
    where = f"Tensor {name[:80]!r} of {origin}"
    if not isinstance(values, dict) or set(values) != {"dtype", "shape", "data_offsets"}:
        raise LockFormatError(
            f"{where} must be described by dtype, shape and data_offsets, and nothing else."
        )
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise LockFormatError(
            f"{where} has dtype {str(dtype)[:40]!r}; a lock holds {', '.join(ITEM_BYTES)} only."
        )
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise LockFormatError(
            f"{where}: shape must be one to three whole numbers from 0, and data_offsets two."
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise LockFormatError(f"{where}: its offsets leave {end - begin} bytes for shape {shape} of {dtype}.")
    return TensorEntry(dtype, tuple(shape), begin, end)


def _is_counts(values: object) -> bool:
    return (
        isinstance(values, list)
        and 1 <= len(values) <= 3
        and all(
            isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 for value in values
        )
    )
