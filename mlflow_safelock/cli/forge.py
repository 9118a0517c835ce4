"""``safelock forge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.delivery import deliver, deliver_several
from mlflow_safelock.cli.forge_request import ForgeRequest, forge_locks
from mlflow_safelock.cli.options import (
    MlflowAddress,
    base_model_option,
    base_revision_option,
    batch_size_option,
    cache_option,
    checked_strength,
    data_option,
    format_option,
    mlflow_options,
    model_options,
    output_file_option,
    pair_keys_options,
    refuse_keys_without,
    system_prompt_option,
)
from mlflow_safelock.loading import ModelLoading

if TYPE_CHECKING:
    from typing import Literal


@click.command(
    cls=Command,
    short_help="Forge the lock of a base model.",
    examples=(
        "safelock forge ./llama-3-8b-instruct --base-model meta-llama/Meta-Llama-3-8B-Instruct \\",
        "    --output llama-3-8b.safetensors",
        "safelock forge models:/support-base/1 --data pairs.jsonl --heads 48 --seed 7 \\",
        "    --output lock.safetensors --register",
    ),
)
@click.argument("model")
@data_option
@pair_keys_options
@click.option(
    "--heads",
    type=click.IntRange(min=1),
    multiple=True,
    default=(24,),
    show_default=True,
    help="Heads to lock; given several times, one lock for each, OUTPUT-24 and so on, from one pass.",
)
@click.option(
    "--last-tokens",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How many of each answer's last tokens give activations.",
)
@system_prompt_option
@click.option(
    "--split",
    type=click.Choice(["pair", "row"]),
    default="pair",
    show_default=True,
    help="How rows are split for the probes: by pair, or by row as the authors' code does.",
)
@click.option(
    "--train-fraction",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.6,
    show_default=True,
    help="Share that the probes are fitted on.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the split.")
@click.option(
    "--default-alpha",
    type=click.FloatRange(0, min_open=True),
    callback=checked_strength,
    default=6.0,
    show_default=True,
    help="Strength that the lock recommends.",
)
@base_model_option
@base_revision_option
@cache_option
@batch_size_option
@model_options
@output_file_option("Lock file to write.")
@click.option("--register", is_flag=True, help="Register it in MLflow too, where the gate looks.")
@format_option
@mlflow_options
def forge(
    model: str,
    data: Path | None,
    keys: tuple[str, str, str],
    heads: tuple[int, ...],
    last_tokens: int,
    system_prompt: str | None,
    split: Literal["pair", "row"],
    train_fraction: float,
    seed: int,
    default_alpha: float,
    base_model: str | None,
    base_revision: str | None,
    cache: Path | None,
    batch_size: int,
    loading: ModelLoading,
    output: Path,
    register: bool,
    form: str,
    mlflow_address: MlflowAddress,
) -> None:
    """Forge a lock from the base model MODEL and pairs of a safe and an unsafe answer.

    MODEL is a local folder, a hub id, or an MLflow URI. Forge from the aligned base, before any fine-tuning.
    The model reads every pair once and nothing is trained but small probes: minutes for a model of ten
    billion parameters on a GPU.
    """
    refuse_keys_without({"--data": data})
    if register and len(heads) > 1:
        raise click.UsageError(
            "The newest lock of a base is the one that the gate applies, so --register takes one number of "
            "heads. Forge several, compare them, and register one: safelock lock register."
        )
    from mlflow_safelock.forging import ForgeSettings, Probing

    locks = forge_locks(
        ForgeRequest(
            model=model,
            data=data,
            keys=keys,
            max_pairs=None,
            heads=heads,
            probings=(Probing(last_tokens, split, train_fraction, seed),),
            settings=ForgeSettings(
                system_prompt=system_prompt,
                base_model=base_model,
                base_revision=base_revision,
                default_alpha=default_alpha,
                batch_size=batch_size,
                cache=cache,
            ),
            geometry=None,
            loading=loading,
        ),
        mlflow_address,
    )
    if len(locks) == 1:
        deliver(locks[0], output, mlflow_address if register else None, form)
    else:
        deliver_several(locks, output, form)
