"""YAML files that people write (recipes, policies): plain values, every key once, faults with their lines.

Plain values are read without the surprises of YAML 1.1: ``no``, ``010`` and ``2026-01-31`` are texts, and
``1e-3`` is a number. Aliases and tags are refused: these files need neither, and both are ways to make a
small file mean something large or live.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mlflow_safelock.errors import SafelockError

MAX_BYTES = 1 << 18
"""Largest file that is read."""

Place = tuple[str | int, ...]
"""Keys and positions that lead to a value, outermost first."""

Form = TypeVar("Form", bound=BaseModel)


@dataclass(frozen=True)
class Document:
    """A YAML file's content.

    Attributes:
        origin: Names the file in errors.
        error: Type of the errors about it.
        values: Its mapping; sequences are tuples.
        places: Where each value stands, such as ``"line 3"``.
    """

    origin: str
    error: type[SafelockError]
    values: dict[str, Any]
    places: Mapping[Place, str]

    def where(self, place: Place) -> str:
        """The file and the line of a value, or of the nearest thing around it that is there."""
        while place and place not in self.places:
            place = place[:-1]
        return f"{self.origin}, {self.places.get(place, 'line 1')}"

    def parsed(self, form: type[Form]) -> Form:
        """The content as a pydantic model, which should be strict and forbid what it does not know.

        Raises:
            SafelockError: Of the type ``error``: a key is unknown or missing, a value of the wrong type or
                not allowed; one line for each fault, with its place.
        """
        try:
            return form.model_validate(self.values)
        except ValidationError as error:
            faults = [_fault(self, form, dict(fault)) for fault in error.errors(include_url=False)]
            raise self.error("\n".join(faults)) from error


def read_document(data: bytes, origin: str, error: type[SafelockError]) -> Document:
    """Read a YAML mapping.

    Args:
        data: The file's bytes.
        origin: Names the file in errors.
        error: Type of the errors.

    Raises:
        SafelockError: Of the type ``error``: it is too large, not UTF-8, not YAML, no mapping, or holds a key
            twice, an alias or a tag.
    """
    reader = _Reader(origin, error)
    values = reader.read(data)
    if not isinstance(values, dict):
        raise error(f"{origin} is not a YAML mapping of keys to values.")
    return Document(origin, error, values, reader.places)


def read_value(text: str, origin: str, error: type[SafelockError]) -> Any:
    """Read one YAML value, such as ``24``, ``pair`` or ``[4, 6]``.

    Raises:
        SafelockError: Of the type ``error``: it is not one.
    """
    return _Reader(origin, error).read(text.encode("utf-8", "surrogateescape"))


def nested_form(form: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model that a field holds, optional or in a sequence or not; ``None`` for plain values."""
    return _model_in(form.model_fields[name].annotation)


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for kind in get_args(annotation) if (found := _model_in(kind))), None)


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader with fewer kinds of plain values and without aliases."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML keeps its table in the class

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not used here", event.start_mark)
        return super().compose_node(parent, index)


_PREFIX = "tag:yaml.org,2002:"
for _tag, _pattern, _first in (
    ("null", r"(?:~|null|)$", ["~", "n", ""]),
    ("bool", r"(?:true|false)$", list("tf")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
):
    _PlainLoader.add_implicit_resolver(_PREFIX + _tag, re.compile(_pattern), _first)

_SCALARS = {_PREFIX + tag for tag in ("null", "bool", "int", "float", "str")}


class _Reader:
    """One reading of one text; ``places`` fills while it goes."""

    def __init__(self, origin: str, error: type[SafelockError]) -> None:
        self.origin, self.error = origin, error
        self.places: dict[Place, str] = {}

    def read(self, data: bytes) -> Any:
        if len(data) > MAX_BYTES:
            raise self.error(f"{self.origin} has more than {MAX_BYTES} bytes, and no such file has.")
        try:
            loader = _PlainLoader(data.decode("utf-8"))
            try:
                node = loader.get_single_node()
                return None if node is None else self._value(loader, node, ())
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
            raise self.error(f"{self.origin}{line}: not YAML as it may be here: {error.problem}.") from error
        except (yaml.YAMLError, ValueError) as error:
            raise self.error(f"{self.origin} is not YAML: {str(error)[:200]}.") from error
        except RecursionError as error:
            raise self.error(f"{self.origin} nests too deeply.") from error

    def _value(self, loader: _PlainLoader, node: yaml.Node, place: Place) -> Any:
        line = f"line {node.start_mark.line + 1}"
        self.places.setdefault(place, line)
        if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
            values: dict[str, Any] = {}
            for key_node, value_node in node.value:
                line, key = f"line {key_node.start_mark.line + 1}", self._key(key_node)
                if key in values:
                    raise self.error(f"{self.origin}, {line}: the key {key!r} is there twice.")
                self.places[*place, key] = line
                values[key] = self._value(loader, value_node, (*place, key))
            return values
        if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
            return tuple(self._value(loader, item, (*place, index)) for index, item in enumerate(node.value))
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            self._check_text(node)
            return loader.construct_object(node)
        raise self.error(f"{self.origin}, {line}: the tag {node.tag[:80]!r} is not used here.")

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag != _PREFIX + "str":
            raise self.error(f"{self.origin}, line {node.start_mark.line + 1}: a key must be text.")
        self._check_text(node)
        return str(node.value)

    def _check_text(self, node: yaml.ScalarNode) -> None:
        """Refuse text that no file can hold and that YAML's escapes can spell: half of a surrogate pair."""
        try:
            node.value.encode()
        except UnicodeEncodeError as error:
            line = f"line {node.start_mark.line + 1}"
            raise self.error(
                f"{self.origin}, {line}: {ascii(node.value)[:80]} has half a character in it."
            ) from error


def _fault(document: Document, form: type[BaseModel], fault: dict[str, Any]) -> str:
    place: Place = fault["loc"]
    key = ".".join(str(part) for part in place)
    where = document.where(place)
    if fault["type"] == "missing":
        return f"{where}: {key} is missing."
    if fault["type"] == "extra_forbidden":
        known = ", ".join(_fields(form, place[:-1]))
        return f"{where}: the key {key} is not known; known here: {known}."
    if fault["type"] == "tuple_type":
        return f"{where}: {key} must be a list, such as [one, two], not {str(fault['input'])[:80]!r}."
    shown = "" if isinstance(fault["input"], dict) else f", not {str(fault['input'])[:80]!r}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {key + ': ' if key else ''}{message}{shown}."


def _fields(form: type[BaseModel], place: Place) -> tuple[str, ...]:
    """The keys that a mapping at a place may have."""
    for part in place:
        if isinstance(part, int):
            continue  # an item of a sequence, whose form is the field's
        inner = nested_form(form, part)
        if inner is None:
            return ()
        form = inner
    return tuple(form.model_fields)
