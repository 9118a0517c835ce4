"""``safelock run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.delivery import deliver
from mlflow_safelock.cli.demo import FOLDER, show_demo
from mlflow_safelock.cli.forge_request import ForgeRequest, forge_locks
from mlflow_safelock.cli.options import (
    MlflowAddress,
    format_option,
    in_existing_folder,
    mlflow_options,
    model_options,
    set_option,
)
from mlflow_safelock.cli.reproduce import FOLDER as REPRODUCTION_FOLDER
from mlflow_safelock.cli.reproduce import show_reproduction
from mlflow_safelock.loading import ModelLoading

if TYPE_CHECKING:
    from mlflow_safelock.recipes import LockRecipe


@click.command(
    cls=Command,
    short_help="Run a recipe: forge a base's lock anew, the demo, or the reproduction.",
    examples=(
        "safelock run llama-3-8b-instruct --model ./llama-3-8b-instruct --output lock.safetensors",
        "safelock run ./my-base.yaml --set forge.heads=48 --set forge.seed=7 --output lock.safetensors",
        "safelock run demo --set fine_tune_examples=20",
    ),
)
@click.argument("recipe", metavar="RECIPE")
@set_option
@click.option(
    "--model", metavar="MODEL", help="Where the base's weights are.  [default: the recipe's base.model]"
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Lock file to write, or the folder of a demo or reproduction.  [default: RECIPE.safetensors, "
    "safelock-demo, safelock-reproduction]",
)
@click.option("--register", is_flag=True, help="Register the lock in MLflow too, where the gate looks.")
@format_option
@model_options
@mlflow_options
def run(
    recipe: str,
    overrides: dict[str, str],
    model: str | None,
    output: Path | None,
    register: bool,
    form: str,
    loading: ModelLoading,
    mlflow_address: MlflowAddress,
) -> None:
    """Run RECIPE: a name from "safelock recipes", or a YAML file of your own.

    A recipe of kind "lock" forges its base model's lock anew; one of kind "demo" runs the demo,
    and one of kind "reproduction" reproduces the paper's claims in small.
    """
    from mlflow_safelock.recipes import DemoRecipe, LockRecipe, load_recipe

    chosen = load_recipe(recipe, overrides)
    if not isinstance(chosen, LockRecipe):
        if model is not None or register:
            raise click.UsageError(
                f"{chosen.name} is no recipe of a lock: --model and --register are for those."
            )
        if isinstance(chosen, DemoRecipe):
            show_demo(chosen, output or FOLDER, form)
        else:
            show_reproduction(chosen, output or REPRODUCTION_FOLDER, form)
        return
    file = in_existing_folder(output or Path(f"{chosen.name}.safetensors"))
    (lock,) = forge_locks(_request(chosen, model or chosen.base.model, loading), mlflow_address)
    deliver(
        lock,
        file,
        mlflow_address if register else None,
        form,
    )


def _request(recipe: LockRecipe, model: str, loading: ModelLoading) -> ForgeRequest:
    from mlflow_safelock.forging import ForgeSettings, Probing

    forge, base = recipe.forge, recipe.base
    return ForgeRequest(
        model=model,
        data=None if forge.dataset is None else Path(forge.dataset),
        keys=(forge.dataset_keys.question, forge.dataset_keys.safe, forge.dataset_keys.unsafe),
        max_pairs=forge.pairs,
        heads=(forge.heads,),
        probings=(Probing(forge.last_tokens, forge.split, forge.train_fraction, forge.seed),),
        settings=ForgeSettings(
            system_prompt=forge.system_prompt,
            base_model=base.model,
            base_revision=base.revision,
            default_alpha=forge.default_alpha,
            batch_size=forge.batch_size,
        ),
        geometry=base.geometry,
        loading=loading,
    )
