"""Finding, reading and checking recipes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from mlflow_safelock.documents import MAX_BYTES, Document, read_document
from mlflow_safelock.errors import RecipeError
from mlflow_safelock.recipes.demo_recipe import DemoRecipe
from mlflow_safelock.recipes.lock_recipe import LockRecipe
from mlflow_safelock.recipes.overrides import overridden
from mlflow_safelock.recipes.reproduction_recipe import ReproductionRecipe

Recipe = LockRecipe | DemoRecipe | ReproductionRecipe
"""A recipe of any kind; ``kind`` says of which."""
R = TypeVar("R", LockRecipe, DemoRecipe, ReproductionRecipe)

_KINDS: dict[str, type[Recipe]] = {
    "lock": LockRecipe,
    "demo": DemoRecipe,
    "reproduction": ReproductionRecipe,
}
_ENDINGS = (".yaml", ".yml")
_NO_OVERRIDES: Mapping[str, str] = MappingProxyType({})


def list_recipes() -> tuple[Recipe, ...]:
    """The recipes that come with this package, by name."""
    return tuple(_shipped(name) for name in _shipped_names())


def published_recipes() -> tuple[LockRecipe, ...]:
    """The recipes that come with this package and know of a published lock, by name."""
    return tuple(
        recipe for recipe in list_recipes() if isinstance(recipe, LockRecipe) and recipe.published is not None
    )


def recipes_of_base(base_model: str) -> tuple[LockRecipe, ...]:
    """The shipped lock recipes of a base model, fewest heads first; none where it is not known.

    Args:
        base_model: The base's identity, exactly as the recipes have it.
    """
    found = [
        recipe
        for recipe in list_recipes()
        if isinstance(recipe, LockRecipe) and recipe.base.model == base_model
    ]
    return tuple(sorted(found, key=lambda recipe: recipe.forge.heads))


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Mapping[str, str] = _NO_OVERRIDES) -> Recipe:
    """Read a recipe that comes with this package, or one of the user's own.

    Args:
        name_or_path: A name from ``list_recipes``, or the path of a YAML file: a text that ends in ``.yaml``
            or ``.yml`` or holds a slash is a path.
        overrides: New values for single settings, written as YAML, by dotted key, such as
            ``{"forge.heads": "48"}``.

    Raises:
        RecipeError: There is no such recipe, it cannot be read, it holds an unknown key or a value of the
            wrong type (the error says where), or an override names no setting.

    Example:
        >>> load_recipe("llama-3-8b-instruct", {"forge.heads": "48"}).forge.heads
        48
    """
    if _is_path(name_or_path):
        path = Path(name_or_path)
        return _checked(read_document(_read(path), str(path), RecipeError), overrides)
    name = str(name_or_path)
    if name not in _shipped_names():
        raise _unknown(name)
    return _checked(_shipped_document(name), overrides) if overrides else _shipped(name)


def shipped_recipe(name: str, kind: type[R], overrides: Mapping[str, str] = _NO_OVERRIDES) -> R:
    """A recipe that comes with this package, of the kind that it must be.

    Raises:
        RecipeError: It is none of these, or as in ``load_recipe``.
    """
    recipe = load_recipe(name, overrides)
    if not isinstance(recipe, kind):
        raise RecipeError(
            f"The recipe {name} is of kind {recipe.kind}.", next_step="Install this package again."
        )
    return recipe


def _is_path(name_or_path: str | os.PathLike[str]) -> bool:
    if not isinstance(name_or_path, str):
        return True
    return name_or_path.endswith(_ENDINGS) or "/" in name_or_path or os.sep in name_or_path


def _unknown(name: str) -> RecipeError:
    near = difflib.get_close_matches(name.lower(), _shipped_names(), n=3, cutoff=0.5)
    return RecipeError(
        f"There is no recipe {name[:80]!r}.",
        next_step=(f"Near it: {', '.join(near)}. " if near else "")
        + "All of them: safelock recipes. A file of your own is given with its ending, as in ./mine.yaml.",
    )


@cache
def _shipped_names() -> tuple[str, ...]:
    files = resources.files(__package__).iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


@cache
def _shipped(name: str) -> Recipe:
    return _checked(_shipped_document(name), _NO_OVERRIDES)


def _shipped_document(name: str) -> Document:
    file = resources.files(__package__) / f"{name}.yaml"
    return read_document(file.read_bytes(), f"recipe {name}", RecipeError)


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise RecipeError(f"{path} is a directory.", next_step="Give the path of a recipe file in it.")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise RecipeError(
            f"The recipe {path} cannot be read: {reason}.", next_step="Check the path."
        ) from error


def _checked(document: Document, overrides: Mapping[str, str]) -> Recipe:
    kind = document.values.get("kind")
    schema = _KINDS.get(kind) if isinstance(kind, str) else None
    if schema is None:
        raise RecipeError(
            f"{document.where(('kind',))}: kind must be one of {', '.join(_KINDS)}, not {kind!r}.",
        )
    return overridden(document, schema, overrides).parsed(schema)
