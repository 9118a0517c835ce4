"""JSON as lock files hold it: one object, every key once, UTF-8, finite numbers."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from mlflow_safelock.errors import LockFormatError


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Read a JSON object strictly.

    Args:
        data: The JSON text.
        what: Names the text in errors, such as ``"The header of a.safetensors"``.

    Raises:
        LockFormatError: It is not UTF-8, not JSON, no object, holds a key twice (at any depth), a byte order
            mark, ``NaN`` or ``Infinity``, a lone surrogate, a number of thousands of digits, or nesting
            without end.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LockFormatError(
            f"{what} is not UTF-8: byte {error.start} is {data[error.start]:#04x}."
        ) from error
    if text.startswith("\ufeff"):
        raise LockFormatError(f"{what} begins with a byte order mark, which JSON does not allow.")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise LockFormatError(f"{what} holds the JSON key {key[:80]!r} twice.")
            values[key] = value
        return values

    def refuse(constant: str) -> NoReturn:
        raise LockFormatError(f"{what} holds {constant}, which is not JSON.")

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()  # escapes can make halves of characters
    except RecursionError as error:
        raise LockFormatError(f"{what} nests JSON too deeply.") from error
    except UnicodeEncodeError as error:
        raise LockFormatError(f"{what} holds half of a character (a lone surrogate).") from error
    except ValueError as error:  # JSONDecodeError, or an int of too many digits
        raise LockFormatError(f"{what} is not JSON: {str(error)[:200]}.") from error
    if not isinstance(value, dict):
        raise LockFormatError(f"{what} is not a JSON object.")
    return value
