"""Changing single settings of a recipe: ``--set forge.heads=48``."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from mlflow_safelock.documents import Document, nested_form, read_value
from mlflow_safelock.errors import RecipeError

_FIXED = {"kind", "name"}


def setting_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of every single setting of a kind of recipe, in the order of its fields."""
    for name in schema.model_fields:
        inner = nested_form(schema, name)
        if inner is None:
            yield prefix + name
        else:
            yield from setting_keys(inner, f"{prefix}{name}.")


def overridden(document: Document, schema: type[BaseModel], overrides: Mapping[str, str]) -> Document:
    """The document with some of its settings replaced; nothing is checked but that there are such settings.

    Args:
        document: The recipe as it was read.
        schema: Its kind.
        overrides: New values as YAML, by dotted key.

    Raises:
        RecipeError: There is no such setting, or the text is not a YAML value.
    """
    values, places = _copied(document.values), dict(document.places)
    valid = [key for key in setting_keys(schema) if key not in _FIXED]
    for key, text in overrides.items():
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            raise RecipeError(
                f"{document.origin} has no setting {key!r} to override."
                + (f" Is it {near[0]!r}?" if near else ""),
                next_step=f"The settings are: {', '.join(valid)}.",
            )
        place = tuple(key.split("."))
        _put(values, place, read_value(text, f"The value of {key}", RecipeError), document.origin)
        places[place] = f"--set {key}={text[:80]}"
    return replace(document, values=values, places=places)


def _put(values: dict[str, Any], place: tuple[str, ...], value: object, origin: str) -> None:
    for depth, part in enumerate(place[:-1], start=1):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{origin} has no {'.'.join(place[:depth])}, so nothing in it can be set.")
    values[place[-1]] = value


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in values.items()}
