"""``safelock reproduce``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.options import format_option, output_folder_option, set_option
from mlflow_safelock.cli.output import announce, counting, show_json, show_lines

if TYPE_CHECKING:
    from mlflow_safelock.recipes import ReproductionRecipe

FOLDER = Path("safelock-reproduction")
"""Where the figures go, if nothing else is asked for."""

FIGURES, TABLES = "reproduction.json", "reproduction.md"


@click.command(
    cls=Command,
    short_help="Reproduce the paper's claims in small.",
    examples=(
        "safelock reproduce --workers 2",
        "safelock reproduce --set seeds=[0,1,2,3,4] --output figures",
        "safelock reproduce --format json > figures.json",
    ),
)
@output_folder_option(FOLDER, f"Folder for {FIGURES} and {TABLES}.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Seeds that are worked on at once, a processor core each; the figures are the same.",
)
@format_option
@set_option
def reproduce(output: Path, workers: int, form: str, overrides: dict[str, str]) -> None:
    """Reproduce the paper's claims in small, in minutes, without any download.

    For each seed a small aligned model is trained here, one lock is forged from it, and it is fine-tuned on
    explicitly harmful examples, into a persona, and on benign data, by all weights and by LoRA. The tables
    compare the lock on all of them, at one strength for all and at one chosen for each, with random and
    shuffled directions, a safety system prompt, re-training on refusals, and subtracting a task vector.
    """
    from mlflow_safelock.recipes import ReproductionRecipe, shipped_recipe

    recipe = shipped_recipe("reproduction", ReproductionRecipe, overrides)
    show_reproduction(recipe, output, form, workers)


def show_reproduction(recipe: ReproductionRecipe, output: Path, form: str, workers: int = 1) -> None:
    """Run a reproduction, write its figures, and show them.

    Raises:
        EvaluationError: The recipe cannot be run.
    """
    announce(f"Reproducing with {len(recipe.seeds)} seeds")
    from mlflow_safelock.reproduction import markdown
    from mlflow_safelock.reproduction import reproduce as run

    output.mkdir(parents=True, exist_ok=True)
    with counting() as told:
        values = run(recipe, told, workers).as_values()
    tables = markdown(values)
    (output / FIGURES).write_text(json.dumps(values, indent=1) + "\n")
    (output / TABLES).write_text(tables)
    if form == "json":
        show_json(values)
        return
    show_lines(*tables.splitlines(), "", f"Every figure with its counts: {output / FIGURES}")
