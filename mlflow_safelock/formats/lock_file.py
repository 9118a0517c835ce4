"""Lock files, format version 1 (docs/lock-format.md): safetensors, written one way and read strictly."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt
import safetensors
import safetensors.numpy

from mlflow_safelock.errors import LockFormatError, LockValidationError
from mlflow_safelock.formats.files import read_bounded, write_atomically
from mlflow_safelock.formats.safetensors_header import (
    TensorEntry,
    encode_header,
    parse_header,
    parse_tensors,
    stored_order,
)
from mlflow_safelock.formats.strict_json import parse_object
from mlflow_safelock.kinship import KinshipSketch
from mlflow_safelock.lock import FORMAT_VERSION, LockedHead, LockMetadata, SafetyLock, canonical_metadata

FORMAT_NAME = "mlflow-safelock"
"""What the metadata of every lock file says under ``format``."""

MAX_FILE_BYTES = 64 << 20
"""Largest file that is read or written; a lock of every head of the largest known base takes under 10 MiB."""

MAX_HEADS = 1 << 16
"""Most heads that a lock file may hold."""

_METADATA_KEYS = {"format", "lock", "digest"}
_SKETCH = {"sketch_layers": "I32", "sketch_offsets": "I64", "sketch_values": "F16"}
_OPTIONAL = {"scores": "F32", "unit_biases": "F32", **_SKETCH}
_DTYPES = {"layers": "I32", "heads": "I32", "directions": "F32", "stds": "F64", **_OPTIONAL}


def save_lock(lock: SafetyLock, path: str | os.PathLike[str]) -> None:
    """Write a lock to a file, all or nothing.

    Args:
        lock: The lock.
        path: The file, replaced where there is one; ``.safetensors`` is the usual ending.

    Raises:
        LockError: The file cannot be written; what was there is as it was.
        LockFormatError: The lock is too large to be read back.

    Example:
        >>> save_lock(lock, "llama-3-8b.safetensors")  # doctest: +SKIP
        >>> load_lock("llama-3-8b.safetensors") == lock  # doctest: +SKIP
        True
    """
    write_atomically(Path(path), lock_to_bytes(lock))


def load_lock(path: str | os.PathLike[str]) -> SafetyLock:
    """Read a lock from a file; nothing in it is executed.

    Args:
        path: A file that ``save_lock`` wrote, of this format version or an older one.

    Raises:
        LockFormatError: The file is missing, unreadable, not a lock file, or of a newer format.
        LockValidationError: What the file says cannot be a lock, or is not what its digest was taken of.
    """
    return lock_from_bytes(read_bounded(Path(path), MAX_FILE_BYTES), origin=str(path))


def lock_to_bytes(lock: SafetyLock) -> bytes:
    """The file of a lock. Equal locks give equal bytes.

    Raises:
        LockFormatError: The lock is too large to be read back.
    """
    tensors = stored_order(lock.tensors())
    metadata = {
        "format": FORMAT_NAME,
        "lock": canonical_metadata(lock.metadata).decode(),
        "digest": lock.digest,
    }
    data = b"".join([encode_header(metadata, tensors), *(values.tobytes() for values in tensors.values())])
    if len(data) > MAX_FILE_BYTES or len(lock.heads) > MAX_HEADS:
        raise LockFormatError(
            f"The lock has {len(lock.heads)} heads and {len(data)} bytes; a lock file holds at most "
            f"{MAX_HEADS} heads in {MAX_FILE_BYTES} bytes."
        )
    return data


def lock_from_bytes(data: bytes, *, origin: str = "lock") -> SafetyLock:
    """Read a lock from the bytes of its file; nothing in them is executed.

    Args:
        data: The whole file.
        origin: Names the file in errors.

    Raises:
        LockFormatError: The bytes are not a lock file, or one of a newer format.
        LockValidationError: What they say cannot be a lock, or is not what its digest was taken of.
    """
    if len(data) > MAX_FILE_BYTES:
        raise LockFormatError(f"{origin} has {len(data)} bytes, and a lock file at most {MAX_FILE_BYTES}.")
    file_metadata, described, begin = parse_header(data, origin)
    metadata = _lock_metadata(file_metadata, origin)
    entries = parse_tensors(described, len(data) - begin, origin)
    _check_tensors(entries, metadata, origin)
    lock = _built(_tensors(data, origin), metadata, origin)
    if lock.digest != file_metadata["digest"]:
        raise LockValidationError(
            f"{origin} states the digest {file_metadata['digest'][:80]!r}, and its contents have "
            f"{lock.digest}: the file was changed or damaged.",
            next_step="Fetch it again from where it was made.",
        )
    return lock


def _lock_metadata(file_metadata: Mapping[str, str], origin: str) -> LockMetadata:
    if file_metadata.get("format") != FORMAT_NAME:
        raise LockFormatError(
            f"{origin} is a safetensors file, but no lock: its metadata says format "
            f"{file_metadata.get('format', '')[:80]!r}, not {FORMAT_NAME!r}."
        )
    if "lock" not in file_metadata:
        raise LockFormatError(f"The metadata of {origin} lacks 'lock'.")
    text = file_metadata["lock"].encode("utf-8", "surrogatepass")
    values = parse_object(text, f"The lock metadata of {origin}")
    _check_version(values.pop("format_version", None), origin)
    # Only now: a newer format may have other keys, and its reader is told to upgrade first.
    if set(file_metadata) != _METADATA_KEYS:
        odd = ", ".join(sorted(repr(key[:80]) for key in set(file_metadata) ^ _METADATA_KEYS))
        raise LockFormatError(f"The metadata of {origin} must hold format, lock and digest only; see {odd}.")
    with _naming(origin):
        metadata = LockMetadata.parse(values)
    if canonical_metadata(metadata) != text:
        raise LockFormatError(f"The lock metadata of {origin} is not in canonical form (RFC 8785).")
    return metadata


def _check_version(version: object, origin: str) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise LockFormatError(f"{origin} has no format version: format_version is {str(version)[:80]!r}.")
    if version > FORMAT_VERSION:
        raise LockFormatError(
            f"{origin} has lock format {version}, and this version reads up to {FORMAT_VERSION}.",
            next_step="Please upgrade mlflow-safelock.",
        )


def _check_tensors(entries: Mapping[str, TensorEntry], metadata: LockMetadata, origin: str) -> None:
    """Compare names, dtypes and shapes with what the metadata makes of them, before any tensor is read."""
    wanted = _DTYPES.keys() - _OPTIONAL.keys()
    if _SKETCH.keys() & entries.keys():
        wanted |= _SKETCH.keys()
    missing = sorted(wanted - entries.keys())
    extra = sorted(name[:80] for name in entries.keys() - _DTYPES.keys())
    if missing or extra:
        raise LockFormatError(
            f"{origin} does not hold a lock's tensors: missing {missing or 'none'}, "
            f"unknown {extra or 'none'}."
        )
    geometry = metadata.geometry
    count = entries["layers"].shape[0]
    if count > MAX_HEADS:
        raise LockFormatError(f"{origin} holds {count} heads, and a lock file holds at most {MAX_HEADS}.")
    shapes = {
        "layers": (count,),
        "heads": (count,),
        "directions": (count, geometry.head_dim),
        "stds": (count,),
        "scores": (geometry.layers, geometry.heads),
        "unit_biases": (count, geometry.hidden),
    }
    if "sketch_values" in entries:
        runs = entries["sketch_values"].shape
        if len(runs) != 3:
            raise LockValidationError(f"Tensor 'sketch_values' of {origin} must have three dimensions.")
        shapes |= {"sketch_layers": runs[:1], "sketch_offsets": runs[:2], "sketch_values": runs}
    for name, entry in entries.items():
        if entry.dtype != _DTYPES[name] or entry.shape != shapes[name]:
            raise LockValidationError(
                f"Tensor {name!r} of {origin} is {entry.dtype} {list(entry.shape)}, and must be "
                f"{_DTYPES[name]} {list(shapes[name])}."
            )


def _tensors(data: bytes, origin: str) -> dict[str, npt.NDArray[Any]]:
    try:
        tensors: dict[str, npt.NDArray[Any]] = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise LockFormatError(f"{origin} is not a sound safetensors file: {error}.") from error
    return tensors


def _built(tensors: Mapping[str, npt.NDArray[Any]], metadata: LockMetadata, origin: str) -> SafetyLock:
    with _naming(origin):
        heads = tuple(
            LockedHead(int(layer), int(head), direction, float(std))
            for layer, head, direction, std in zip(
                tensors["layers"], tensors["heads"], tensors["directions"], tensors["stds"], strict=True
            )
        )
        parts = tuple(tensors[name] for name in _SKETCH if name in tensors)
        sketch = KinshipSketch(*parts) if parts else None
        lock = SafetyLock(heads, metadata, tensors.get("scores"), tensors.get("unit_biases"), sketch)
    if lock.heads != heads:
        raise LockValidationError(f"The heads of {origin} are not sorted by layer, then head.")
    return lock


@contextmanager
def _naming(origin: str) -> Iterator[None]:
    """Say in which file a value was found that no lock can have."""
    try:
        yield
    except LockValidationError as error:
        raise LockValidationError(f"{origin}: {error.cause}", next_step=error.next_step) from error
