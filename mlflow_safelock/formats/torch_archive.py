"""The zip file that ``torch.save`` writes, read within bounds and never unpacked."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

from mlflow_safelock.errors import LockFormatError
from mlflow_safelock.formats.content import known_content

MAX_ARCHIVE_BYTES = 1 << 20
"""Largest archive that is read; the largest published one has 28 KB."""

_PICKLE = "data.pkl"
_FIXED_CONTENTS = {"byteorder": b"little", "version": b"3\n"}
_SERIALIZATION_ID = ".data/serialization_id"
_KNOWN = {_PICKLE, _SERIALIZATION_ID, *_FIXED_CONTENTS}


def read_pickle_bytes(data: bytes, origin: str) -> bytes:
    """The pickle in a ``torch.save`` archive that holds no tensors: its bytes, unopened.

    Args:
        data: The archive.
        origin: Names the file in errors.

    Raises:
        LockFormatError: It is no zip archive, a damaged, compressed or encrypted one, or it holds anything
            but the pickle and the three small entries that ``torch.save`` puts beside it.
    """
    if not data.startswith(b"PK\x03\x04"):
        kind = "a safetensors file" if data[8:9] == b"{" else known_content(data) or "of no kind known here"
        raise LockFormatError(
            f"{origin} is {kind}, and published locks are zip archives that torch.save wrote.",
            next_step="A lock in this project's own format is read by load_lock.",
        )
    if len(data) > MAX_ARCHIVE_BYTES:
        raise LockFormatError(
            f"{origin} has {len(data)} bytes, and a published lock at most {MAX_ARCHIVE_BYTES}."
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            contents = {
                name: _content(archive, entry, origin) for name, entry in _entries(archive, origin).items()
            }
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        NotImplementedError,
        RuntimeError,
        ValueError,
        OSError,
        EOFError,
        struct.error,
        zlib.error,
    ) as error:
        raise LockFormatError(f"The zip archive {origin} is damaged: {str(error)[:200]}.") from error
    for name, expected in _FIXED_CONTENTS.items():
        if contents.get(name, expected) != expected:
            raise LockFormatError(
                f"{name!r} in {origin} says {contents[name][:20]!r} instead of {expected!r}."
            )
    return contents[_PICKLE]


def _entries(archive: zipfile.ZipFile, origin: str) -> dict[str, zipfile.ZipInfo]:
    """The archive's entries by their name below its one root folder, checked before any is read."""
    entries: dict[str, zipfile.ZipInfo] = {}
    roots = set()
    for entry in archive.infolist():
        root, _, name = entry.filename.partition("/")
        roots.add(root)
        if name not in _KNOWN:
            raise LockFormatError(f"{origin} holds {entry.filename[:80]!r}, which no published lock does.")
        if name in entries:
            raise LockFormatError(f"{origin} holds {entry.filename[:80]!r} twice.")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise LockFormatError(
                f"{entry.filename[:80]!r} in {origin} is compressed, and torch.save compresses nothing."
            )
        if entry.flag_bits & 0x1:
            raise LockFormatError(f"{entry.filename[:80]!r} in {origin} is encrypted.")
        if entry.file_size > MAX_ARCHIVE_BYTES:
            raise LockFormatError(f"{entry.filename[:80]!r} in {origin} claims {entry.file_size} bytes.")
        entries[name] = entry
    if _PICKLE not in entries or len(roots) != 1:
        raise LockFormatError(
            f"{origin} is a zip archive, but not one that torch.save wrote: it lacks {_PICKLE}."
        )
    return entries


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, origin: str) -> bytes:
    with archive.open(entry) as file:
        content = file.read(MAX_ARCHIVE_BYTES + 1)
    if len(content) != entry.file_size:
        raise LockFormatError(f"{entry.filename[:80]!r} in {origin} is cut short.")
    return content
