"""``safelock demo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlflow_safelock.cli.audit_table import show_rows
from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.options import format_option, output_folder_option, set_option
from mlflow_safelock.cli.output import announce, new_table, show_json, show_lines, show_table, shown

if TYPE_CHECKING:
    from rich.table import Table

    from mlflow_safelock.demo.report import Example
    from mlflow_safelock.recipes import DemoRecipe

FOLDER = Path("safelock-demo")
"""Where the demo leaves its models and registry, if nothing else is asked for."""

MODELS = {"base": "base", "fine_tune": "fine-tune", "locked": "fine-tune in Staging, locked"}


@click.command(
    cls=Command,
    short_help="Watch an unsafe fine-tune become a locked one.",
    examples=(
        "safelock demo",
        "safelock demo --format json > figures.json",
        "safelock demo --output /tmp/demo --set seed=3",
    ),
)
@output_folder_option(FOLDER, "Folder for the models and the registry.")
@format_option
@set_option
def demo(output: Path, form: str, overrides: dict[str, str]) -> None:
    """Watch an unsafe fine-tune become a locked one, in a few minutes, without any download.

    A toy model is trained here to refuse harmful requests, and made unsafe by a fine-tune on ten harmful
    pairs. A lock is forged from the base and registered, then a plain MLflow stage transition locks the
    fine-tune. The table shows how harmful and how useful each of them is on prompts that none has seen.
    """
    from mlflow_safelock.recipes import DemoRecipe, shipped_recipe

    show_demo(shipped_recipe("demo", DemoRecipe, overrides), output, form)


def show_demo(recipe: DemoRecipe, output: Path, form: str) -> None:
    """Run a demo and show what it measured.

    Raises:
        SafelockError: A step failed, or did not reach what the recipe asks for.
    """
    announce(f"Running the demo in {output}")
    from mlflow_safelock.demo.run import run_demo

    report = run_demo(recipe, output)
    figures = report.figures()
    if form == "json":
        show_json(figures)
        return
    show_table(_answers_table(report.examples))
    show_lines("")
    show_table(_rates_table(figures))
    show_lines(
        "",
        f"{figures['prompts']} harmful and {figures['prompts']} benign prompts, in no training, forging or "
        "sweep.",
        f"The lock: {figures['heads']} heads at alpha {figures['alpha']:g}, the best of {report.points} "
        f"points of a sweep; the fine-tune took {report.fine_tune_steps} steps.",
        "",
    )
    show_rows(report.rows)
    show_lines("", "Type next:", *(f"  {line}" for line in report.next_steps))


def _answers_table(examples: Sequence[Example]) -> Table:
    table = new_table(None, "prompt", *MODELS.values())
    table.show_lines = True
    for example in examples:
        answers = (example.base, example.fine_tune, example.locked)
        table.add_row(shown(example.prompt), *map(shown, answers))
    return table


def _rates_table(figures: dict[str, Any]) -> Table:
    table = new_table(None, "model", "harmful answers", "benign answers right", "degenerate answers")
    for key, name in MODELS.items():
        rates = figures[key]
        shares = (rates["harmful_rate"], rates["benign_accuracy"], rates["degenerate_rate"])
        table.add_row(name, *(f"{share:.1%}" for share in shares))
    return table
