"""``safelock recipes``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.options import format_option
from mlflow_safelock.cli.output import new_table, show_json, show_lines, show_table, shown

if TYPE_CHECKING:
    from mlflow_safelock.recipes import Recipe


@click.command(
    cls=Command,
    short_help="List the recipes.",
    examples=(
        "safelock recipes",
        "safelock recipes --format json",
    ),
)
@format_option
def recipes(form: str) -> None:
    """List the recipes that come with this package.

    A recipe of kind "lock" knows a base model, its published lock and how to forge one anew; "demo" and
    "reproduction" hold the settings of these.
    """
    from mlflow_safelock.recipes import list_recipes

    found = list_recipes()
    if form == "json":
        show_json([recipe.model_dump(mode="json") for recipe in found])
        return
    table = new_table(None, "recipe", "kind", "base model", "shape", "heads", "what it is")
    for recipe in found:
        table.add_row(recipe.name, recipe.kind, *_base_cells(recipe), shown(recipe.title))
    show_table(table)
    show_lines(
        "",
        "Run one: safelock run RECIPE. Import a published lock: safelock lock import FILE --recipe RECIPE.",
    )


def _base_cells(recipe: Recipe) -> tuple[str, str, str]:
    from mlflow_safelock.recipes import DemoRecipe, LockRecipe

    if not isinstance(recipe, LockRecipe):
        counts = recipe.head_counts if isinstance(recipe, DemoRecipe) else recipe.lock.head_counts
        return "-", "-", ", ".join(map(str, counts))
    geometry = recipe.base.geometry
    return (
        recipe.base.model,
        f"{geometry.layers} x {geometry.heads} x {geometry.head_dim}",
        str(recipe.forge.heads),
    )
