"""Reading rows out of JSON, JSON Lines and CSV files, each row with the line it starts on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mlflow_safelock.errors import PreferenceDataError


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        line: The line it starts on, from 1.
        values: What it holds: an object's values by key, or, where the file holds something else in its
            place, that.
    """

    line: int
    values: Any


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, in order; its suffix says what it is.

    ``.json`` holds one list of objects, ``.jsonl`` an object per line, ``.csv`` a header and comma-separated
    values. Text is UTF-8, with or without a byte order mark. Blank lines are passed over.

    Raises:
        PreferenceDataError: The file cannot be read, is of another kind, or is not what its suffix says; with
            the line.
    """
    readers = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise PreferenceDataError(
            f"{path} is none of the files that hold preference pairs.",
            next_step=f"Give it one of the suffixes {', '.join(readers)}.",
        )
    return reader(path, _text(path))


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PreferenceDataError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        _refuse(path, line, "the text is not UTF-8", error)


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    # The list is taken apart item by item, because json.loads knows no lines once it is done.
    position, line = _past_blanks(text, 0), 1
    line += text.count("\n", 0, position)
    if text[position : position + 1] != "[":
        _refuse(path, line, "a .json file must hold one list of objects, in [ and ]")
    opened = position
    while True:
        start = _past_blanks(text, position + 1)
        line += text.count("\n", position, start)
        if text[start : start + 1] == "]" and position == opened:
            break
        values, end = _decoded(path, text, start, line)
        yield Row(line, values)
        position = _past_blanks(text, end)
        line += text.count("\n", start, position)
        if text[position : position + 1] == "]":
            start = position
            break
        if text[position : position + 1] != ",":
            _refuse(path, line, "not JSON: a comma or ] is missing after an item of the list")
    rest = _past_blanks(text, start + 1)
    if rest != len(text):
        _refuse(path, line + text.count("\n", start, rest), "not JSON: there is text after the list")


def _jsonl_rows(path: Path, text: str) -> Iterator[Row]:
    for line, row in enumerate(text.split("\n"), start=1):
        start = _past_blanks(row, 0)
        if start == len(row):
            continue
        values, end = _decoded(path, row, start, line)
        if _past_blanks(row, end) != len(row):
            _refuse(path, line, "not JSON: there is text after the object")
        yield Row(line, values)


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            _refuse(path, line, f"not CSV: {error}", error)
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) != len(header):
                _refuse(path, line, "the header names a column twice")
        elif len(cells) != len(header):
            _refuse(
                *(path, line),
                f"the row has {len(cells)} values, and the header names {len(header)} columns",
                next_step="Put texts that hold commas in quotes, in the first line, too.",
            )
        else:
            yield Row(line, dict(zip(header, cells, strict=True)))


def _decoded(path: Path, text: str, start: int, line: int) -> tuple[Any, int]:
    """The JSON value at a position, and the position after it."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        fault_line = line + text.count("\n", start, error.pos)
        _refuse(path, fault_line, f"not JSON: {error.msg}", error)
    except RecursionError as error:
        _refuse(path, line, "the JSON is nested too deeply", error)
    except ValueError as error:  # a key twice, NaN, or a number of thousands of digits
        _refuse(path, line, f"not JSON to rely on: {str(error)[:200]}", error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key[:80]!r} stands in an object twice")
        values[key] = value
    return values


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def _past_blanks(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _refuse(
    path: Path, line: int, fault: str, error: Exception | None = None, next_step: str = ""
) -> NoReturn:
    raise PreferenceDataError(f"{path}, line {line}: {fault}.", next_step=next_step) from error
