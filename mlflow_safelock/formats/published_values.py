"""What the pickle of a published lock says: layers, heads, float16 directions and stds.

The pickle's calls are compared with the one form that NumPy writes for each value, and the numbers are then
taken from the bytes they carry. No NumPy function runs on an argument that the file chose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_safelock.errors import LockFormatError
from mlflow_safelock.formats.inert_pickle import Call, Global

RECONSTRUCT = Global("numpy.core.multiarray", "_reconstruct")
SCALAR = Global("numpy.core.multiarray", "scalar")
NDARRAY = Global("numpy", "ndarray")
DTYPE = Global("numpy", "dtype")
ENCODE = Global("_codecs", "encode")

PUBLISHED_GLOBALS = frozenset({RECONSTRUCT, SCALAR, NDARRAY, DTYPE, ENCODE})
"""The only names in any of the published pickles."""

MAX_HEADS = 4096
"""Most heads that are read from a published lock; the largest one has 48."""

MAX_HEAD_INDEX = 65535
"""Largest head index that is read; the published ones stay below 96."""

MAX_HEAD_DIM = 1024
"""Longest direction that is read; the published ones have 128 numbers."""

_LAYER_KEY = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,3})\.self_attn\.head_out")
_DTYPE_STATE = (3, "<", None, None, None, -1, -1, 0)
_FLOATS: dict[str, np.dtype[Any]] = {"f2": np.dtype("<f2"), "f4": np.dtype("<f4"), "f8": np.dtype("<f8")}
_INTEGERS: dict[str, np.dtype[Any]] = {"i4": np.dtype("<i4"), "i8": np.dtype("<i8")}


@dataclass(frozen=True, eq=False)
class PublishedHead:
    """One head of a published lock, with the numbers exactly as they are in the file.

    Attributes:
        layer: Index of the decoder layer.
        head: Index of the query head.
        direction: float16 of shape ``[head_dim]``, of norm one up to float16 rounding.
        std: Standard deviation along the direction.
    """

    layer: int
    head: int
    direction: npt.NDArray[np.float16]
    std: float


def published_heads(content: object, origin: str) -> tuple[PublishedHead, ...]:
    """The heads that the content of a published pickle describes, sorted by layer, then head.

    Args:
        content: What ``read_inert`` made of the pickle.
        origin: Names the file in errors.

    Raises:
        LockFormatError: Anything is not of the published form: ``{"model.layers.<l>.self_attn.head_out":
            [(head, direction, std), …]}``.
    """
    if not isinstance(content, dict) or not content:
        raise LockFormatError(f"{origin} does not hold a dict of layers, as published locks do.")
    found: dict[tuple[int, int], PublishedHead] = {}
    for key, entries in content.items():
        match = _LAYER_KEY.fullmatch(key)
        if match is None:
            raise LockFormatError(
                f"{origin} holds the key {key[:80]!r}, and published locks have keys such as "
                "'model.layers.12.self_attn.head_out'."
            )
        layer = int(match[1])
        if not isinstance(entries, list) or not entries:
            raise LockFormatError(f"Layer {layer} of {origin} is not a list of heads.")
        for entry in entries:
            head = _head(entry, layer, origin)
            if (layer, head.head) in found:
                raise LockFormatError(f"{origin} holds head {head.head} of layer {layer} twice.")
            found[layer, head.head] = head
            if len(found) > MAX_HEADS:
                raise LockFormatError(f"{origin} holds more than {MAX_HEADS} heads.")
    return tuple(found[where] for where in sorted(found))


def _head(entry: object, layer: int, origin: str) -> PublishedHead:
    where = f"An entry of layer {layer} of {origin}"
    if not isinstance(entry, tuple) or len(entry) != 3:
        raise LockFormatError(f"{where} is not (head, direction, std).")
    head = entry[0] if _is_int(entry[0]) else _scalar(entry[0], _INTEGERS)
    if head is None or not 0 <= head <= MAX_HEAD_INDEX:
        raise LockFormatError(f"{where} has a head that is not a whole number from 0 to {MAX_HEAD_INDEX}.")
    direction = _float16_vector(entry[1])
    if direction is None:
        raise LockFormatError(f"{where} has a direction that is not a float16 vector as NumPy writes it.")
    std = entry[2] if isinstance(entry[2], float) else _scalar(entry[2], _FLOATS)
    if std is None:
        raise LockFormatError(f"{where} has a std that is not a floating-point number.")
    return PublishedHead(layer, int(head), direction, float(std))


def _scalar(value: object, dtypes: dict[str, np.dtype[Any]]) -> float | int | None:
    """The number in ``scalar(dtype, bytes)``, or ``None`` where the value is not of that form."""
    if not isinstance(value, Call) or value.function != SCALAR or value.state is not None:
        return None
    if len(value.arguments) != 2:
        return None
    dtype = _dtype(value.arguments[0], dtypes)
    content = None if dtype is None else _bytes(value.arguments[1], dtype.itemsize)
    if content is None:
        return None
    number: float | int = np.frombuffer(content, dtype=dtype)[0].item()
    return number


def _float16_vector(value: object) -> npt.NDArray[np.float16] | None:
    """The vector given as state to ``_reconstruct(ndarray, (0,), b"b")``; ``None`` for any other form."""
    if not isinstance(value, Call) or value.function != RECONSTRUCT or len(value.arguments) != 3:
        return None
    kind, shape, code = value.arguments
    if kind != NDARRAY or shape != (0,) or _bytes(code, 1) != b"b":
        return None
    if value.state is None or len(value.state) != 5:
        return None
    version, shape, dtype, fortran, content = value.state
    if version != 1 or fortran is not False or _dtype(dtype, {"f2": _FLOATS["f2"]}) is None:
        return None
    if not isinstance(shape, tuple) or len(shape) != 1 or not _is_int(shape[0]):
        return None
    if not 1 <= shape[0] <= MAX_HEAD_DIM:
        return None
    numbers = _bytes(content, 2 * shape[0])
    return None if numbers is None else np.frombuffer(numbers, dtype="<f2").astype(np.float16)


def _dtype(value: object, dtypes: dict[str, np.dtype[Any]]) -> np.dtype[Any] | None:
    """The dtype of ``dtype(name, False, True)``, little-endian, where ``dtypes`` has the name."""
    if not isinstance(value, Call) or value.function != DTYPE or value.state != _DTYPE_STATE:
        return None
    if len(value.arguments) != 3 or value.arguments[1:] != (False, True):
        return None
    name = value.arguments[0]
    return dtypes.get(name) if isinstance(name, str) else None


def _bytes(value: object, length: int) -> bytes | None:
    """The bytes of ``encode(text, "latin1")``, which is how protocol 2 writes them, if they are so many."""
    if not isinstance(value, Call) or value.function != ENCODE or value.state is not None:
        return None
    if len(value.arguments) != 2 or value.arguments[1] != "latin1":
        return None
    text = value.arguments[0]
    if not isinstance(text, str) or len(text) != length:
        return None
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
