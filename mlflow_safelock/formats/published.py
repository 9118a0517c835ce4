"""Import of the locks that the method's authors published (arXiv 2410.10343)."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlflow_safelock.errors import LockMismatchError, LockValidationError, RecipeError
from mlflow_safelock.formats.files import read_bounded
from mlflow_safelock.formats.inert_pickle import read_inert
from mlflow_safelock.formats.published_values import PUBLISHED_GLOBALS, PublishedHead, published_heads
from mlflow_safelock.formats.torch_archive import MAX_ARCHIVE_BYTES, read_pickle_bytes
from mlflow_safelock.lock import AttentionGeometry, LockedHead, LockMetadata, SafetyLock
from mlflow_safelock.recipes import LockRecipe, published_recipes

NORM_TOLERANCE = 1e-3
"""Largest distance from one of a published direction's norm.

Dividing in float16 rounds the norm and then each quotient, by at most one part in 2048 each; together that is
0.00098, and the published files reach 0.00065.
"""


def import_published_lock(
    path: str | os.PathLike[str],
    *,
    base_model: str,
    geometry: AttentionGeometry | None = None,
    default_alpha: float = 6.0,
) -> SafetyLock:
    """Read a lock that the method's authors published; nothing in the file is executed.

    The published directions are float16 and only nearly of norm one. Each becomes float32 of norm one, and
    its std is multiplied by the norm it had, so that the push ``alpha * std * direction`` stays what the
    authors' file says, up to float32 rounding.

    Args:
        path: The file, in the form that ``torch.save`` gave it.
        base_model: The base model it is for, by its hub id, as the recipes have it.
        geometry: The base's attention shape. Needed where no recipe knows the base; where one does, it must
            agree with the recipe.
        default_alpha: Strength that the lock recommends; the paper's is 6.

    Returns:
        A lock of origin ``published``, without scores. One file always gives the same digest.

    Raises:
        LockFormatError: The file cannot be read, is no published lock, or holds anything that could be run.
        LockValidationError: A direction is not of norm one, a std is not above zero, or a number is not
            finite.
        LockMismatchError: The file is for another base model than ``base_model``.
        RecipeError: No recipe knows the base model, and no geometry was given.

    Example:
        >>> import_published_lock(
        ...     "Meta-Llama-3-8B-Instruct.safelock", base_model="meta-llama/Meta-Llama-3-8B-Instruct"
        ... )  # doctest: +SKIP
    """
    origin = str(path)
    heads = read_published_heads(path)
    recipe = _recipe_for(heads, base_model, origin)
    if recipe is not None:
        if geometry not in (None, recipe.base.geometry):
            raise LockMismatchError(
                f"{base_model} has {recipe.base.geometry}, and geometry= says {geometry}.",
                next_step="Leave geometry= out: the recipe knows it.",
            )
        geometry = recipe.base.geometry
    if geometry is None:
        raise _unknown_base(base_model)
    _check_shapes(heads, base_model, geometry, origin)
    metadata = LockMetadata.parse(
        {
            "base_model": base_model,
            "base_revision": None if recipe is None else recipe.base.revision,
            "architecture": None if recipe is None else recipe.base.architecture,
            "geometry": geometry,
            "origin": "published",
            "last_tokens": None,
            "pairs": None,
            "split": None,
            "train_fraction": None,
            "seed": None,
            "system_prompt": None,
            "dataset_digest": None,
            "default_alpha": default_alpha,
            "created": None,
            "tools": None,
        }
    )
    return SafetyLock(tuple(_locked(head, origin) for head in heads), metadata)


def read_published_heads(path: str | os.PathLike[str]) -> tuple[PublishedHead, ...]:
    """The heads of a published lock file as they are in it, sorted by layer, then head.

    Raises:
        LockFormatError: The file cannot be read, is no published lock, or holds anything that could be run.
    """
    origin = str(path)
    pickled = read_pickle_bytes(read_bounded(Path(path), MAX_ARCHIVE_BYTES), origin)
    return published_heads(read_inert(pickled, allowed=PUBLISHED_GLOBALS, origin=origin), origin)


def fingerprint(heads: Sequence[PublishedHead]) -> str:
    """``sha256:…`` over a published lock's numbers, whatever file they came in.

    Each head adds its layer and head as int32, its std as float64 and its direction as float16, all
    little-endian, in the order of layers and heads.
    """
    digest = hashlib.sha256()
    for head in sorted(heads, key=lambda head: (head.layer, head.head)):
        digest.update(struct.pack("<iid", head.layer, head.head, head.std))
        digest.update(head.direction.astype("<f2").tobytes())
    return f"sha256:{digest.hexdigest()}"


def _recipe_for(heads: Sequence[PublishedHead], base_model: str, origin: str) -> LockRecipe | None:
    """The recipe of this base that expects such a file; ``None`` where no recipe knows the base."""
    candidates = [recipe for recipe in published_recipes() if recipe.base.model == base_model]
    if not candidates:
        return None
    fitting = [recipe for recipe in candidates if _fits(recipe, heads)]
    owner = _owner(heads)
    if not fitting or owner not in (None, base_model):
        expected = " or ".join(_expectation(recipe) for recipe in candidates)
        raise LockMismatchError(
            f"{origin} holds {_shape(heads)}. A published lock of {base_model}, which has "
            f"{candidates[0].base.geometry}, holds {expected}{', but other numbers' if fitting else ''}.",
            next_step=_better_base(heads, owner),
        )
    return fitting[0]


def _fits(recipe: LockRecipe, heads: Sequence[PublishedHead]) -> bool:
    published, geometry = recipe.published, recipe.base.geometry
    return (
        published is not None
        and published.heads == len(heads)
        and published.layers == (heads[0].layer, heads[-1].layer)
        and all(head.head < geometry.heads and head.direction.size == geometry.head_dim for head in heads)
    )


def _owner(heads: Sequence[PublishedHead]) -> str | None:
    """The base whose published lock has exactly these numbers: shapes alone cannot tell Llama 3 from 3.1."""
    mark = fingerprint(heads)
    for recipe in published_recipes():
        if recipe.published is not None and recipe.published.fingerprint == mark:
            return recipe.base.model
    return None


def _better_base(heads: Sequence[PublishedHead], owner: str | None) -> str:
    fitting = [owner] if owner else sorted({r.base.model for r in published_recipes() if _fits(r, heads)})
    if not fitting:
        return "It fits no base that the recipes know; check where the file came from."
    return f"It fits {' or '.join(fitting)}: import it for that base model, or fetch the right file."


def _shape(heads: Sequence[PublishedHead]) -> str:
    widths = sorted({head.direction.size for head in heads})
    return (
        f"{len(heads)} heads in layers {heads[0].layer}-{heads[-1].layer}, indices up to "
        f"{max(head.head for head in heads)} (head_dim {', '.join(map(str, widths[:3]))})"
    )


def _expectation(recipe: LockRecipe) -> str:
    if recipe.published is None:
        return str(recipe.base.geometry)
    first, last = recipe.published.layers
    return f"{recipe.published.heads} heads in layers {first}-{last}"


def _unknown_base(base_model: str) -> RecipeError:
    known = sorted({recipe.base.model for recipe in published_recipes()})
    lowered = {name.lower(): name for name in known}
    near = [lowered[name] for name in difflib.get_close_matches(base_model.lower(), lowered, n=2)]
    return RecipeError(
        f"No recipe knows the attention shape of base model {base_model!r}."
        + (f" Is it {' or '.join(near)}?" if near else ""),
        next_step=f"Pass geometry=AttentionGeometry(...), or one of the known bases: {', '.join(known)}.",
    )


def _check_shapes(
    heads: Sequence[PublishedHead], base_model: str, geometry: AttentionGeometry, origin: str
) -> None:
    for head in heads:
        if (
            head.layer >= geometry.layers
            or head.head >= geometry.heads
            or head.direction.size != geometry.head_dim
        ):
            raise LockMismatchError(
                f"{origin} holds {_shape(heads)}, and {base_model} has {geometry}.",
                next_step=_better_base(heads, _owner(heads)),
            )


def _locked(head: PublishedHead, origin: str) -> LockedHead:
    where = f"{origin}: head {head.head} of layer {head.layer}"
    values = head.direction.astype(np.float64)
    if not np.isfinite(values).all():
        raise LockValidationError(f"{where}: the direction holds NaN or infinity.")
    # float16 squares are exact in float64 and fsum rounds once, so every machine finds the same norm.
    norm = math.sqrt(math.fsum(float(value) * float(value) for value in values))
    if abs(norm - 1.0) > NORM_TOLERANCE:
        raise LockValidationError(
            f"{where}: the direction's norm is {norm:.6g}, further from 1 than float16 rounding explains."
        )
    if not math.isfinite(head.std) or head.std <= 0.0:
        raise LockValidationError(f"{where}: std must be a finite number above zero, not {head.std!r}.")
    return LockedHead(head.layer, head.head, (values / norm).astype(np.float32), head.std * norm)
