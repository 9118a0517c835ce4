"""YAML as recipes hold it: plain values, every key once, and where in the file each of them stands.

Plain values are read without the surprises of YAML 1.1: ``no``, ``010`` and ``2026-01-31`` are texts, and
``1e-3`` is a number. Aliases and tags are refused: a recipe needs neither, and both are ways to make a small
file mean something large or live.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from mlflow_safelock.errors import RecipeError

MAX_BYTES = 1 << 18
"""Largest recipe that is read."""

Place = tuple[str | int, ...]
"""Keys and positions that lead to a value, outermost first."""


@dataclass(frozen=True)
class Document:
    """A YAML file's content.

    Attributes:
        origin: Names the file in errors.
        values: Its mapping; sequences are tuples.
        places: Where each value stands, such as ``"line 3"``.
    """

    origin: str
    values: dict[str, Any]
    places: Mapping[Place, str]

    def where(self, place: Place) -> str:
        """The file and the line of a value, or of the nearest thing around it that is there."""
        while place and place not in self.places:
            place = place[:-1]
        return f"{self.origin}, {self.places.get(place, 'line 1')}"


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader with fewer kinds of plain values and without aliases."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML keeps its table in the class

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not used in recipes", event.start_mark)
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


def read_document(data: bytes, origin: str) -> Document:
    """Read a YAML mapping.

    Raises:
        RecipeError: It is too large, not UTF-8, not YAML, no mapping, or holds a key twice, an alias or a
            tag.
    """
    places: dict[Place, str] = {}
    values = _read(data, origin, places)
    if not isinstance(values, dict):
        raise RecipeError(f"{origin} is not a YAML mapping of keys to values.")
    return Document(origin, values, places)


def read_value(text: str, origin: str) -> Any:
    """Read one YAML value, such as ``24``, ``pair`` or ``[4, 6]``.

    Raises:
        RecipeError: It is not one.
    """
    return _read(text.encode("utf-8", "surrogateescape"), origin, {})


def _read(data: bytes, origin: str, places: dict[Place, str]) -> Any:
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{origin} has more than {MAX_BYTES} bytes, and a recipe has fewer.")
    try:
        loader = _PlainLoader(data.decode("utf-8"))
        try:
            node = loader.get_single_node()
            return None if node is None else _value(loader, node, (), origin, places)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise RecipeError(f"{origin}{line}: not YAML that a recipe may hold: {error.problem}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{origin} is not YAML: {str(error)[:200]}.") from error
    except RecursionError as error:
        raise RecipeError(f"{origin} nests too deeply.") from error


def _value(loader: _PlainLoader, node: yaml.Node, place: Place, origin: str, places: dict[Place, str]) -> Any:
    line = f"line {node.start_mark.line + 1}"
    places.setdefault(place, line)
    if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(key_node, origin)
            if key in values:
                raise RecipeError(
                    f"{origin}, line {key_node.start_mark.line + 1}: the key {key!r} is there twice."
                )
            places[*place, key] = f"line {key_node.start_mark.line + 1}"
            values[key] = _value(loader, value_node, (*place, key), origin, places)
        return values
    if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
        return tuple(
            _value(loader, item, (*place, index), origin, places) for index, item in enumerate(node.value)
        )
    if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
        return loader.construct_object(node)
    raise RecipeError(f"{origin}, {line}: the tag {node.tag[:80]!r} is not used in recipes.")


def _key(node: yaml.Node, origin: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag != _PREFIX + "str":
        raise RecipeError(f"{origin}, line {node.start_mark.line + 1}: a key must be text.")
    return str(node.value)
