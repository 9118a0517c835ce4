"""What a file really is, told from its bytes and never from its name."""

from __future__ import annotations

import pickletools

_PICKLE = "a pickle, which could run code when it is opened"
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive, such as torch.save writes"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x80\x02", _PICKLE),
    (b"\x80\x03", _PICKLE),
    (b"\x80\x04", _PICKLE),
    (b"\x80\x05", _PICKLE),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"\x93NUMPY", "a NumPy array file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"GGUF", "a GGUF model"),
    (b"\x7fELF", "an executable"),
    (b"MZ", "an executable"),
    (b"version https://git-lfs", "a Git LFS pointer, so the file itself was never downloaded"),
    (b"<!DOCTYPE", "a web page"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"{", "JSON text"),
)
_LONGEST_TEXT_PICKLE = 1 << 20
"""Bytes that are looked through for a pickle without a signature (protocols 0 and 1)."""


def known_content(data: bytes) -> str | None:
    """Name the kind of file that the bytes are, or ``None`` where they are of no kind known here.

    Nothing is opened or run: signatures are compared, and pickles without one are recognised by reading
    their instructions without following them.
    """
    if not data:
        return "an empty file"
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    return _PICKLE if _is_old_pickle(data) else None


def _is_old_pickle(data: bytes) -> bool:
    if not data.rstrip().endswith(b".") or len(data) > _LONGEST_TEXT_PICKLE:
        return False
    try:
        instructions = sum(1 for _ in pickletools.genops(data))
    except Exception:  # noqa: BLE001 - whatever pickletools makes of it, it is then no pickle
        return False
    return instructions > 1
