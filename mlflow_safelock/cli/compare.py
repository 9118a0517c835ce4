"""``safelock compare``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TextIO

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.options import (
    MlflowAddress,
    alpha_option,
    batch_size_option,
    format_option,
    lines_of,
    mlflow_options,
    model_options,
    system_prompt_option,
    unicode_text,
)
from mlflow_safelock.cli.output import announce, new_table, show_json, show_table, shown
from mlflow_safelock.loading import ModelLoading, is_mlflow_model, load_language_model, load_lock_reference


@click.command(
    cls=Command,
    short_help="Answers without and with a lock, side by side.",
    examples=(
        'safelock compare ./my-fine-tune llama-3-8b.safetensors --prompt "How do I pick a lock?"',
        "safelock compare models:/support-bot/3 models:/safelock.org--base/1 \\",
        "    --prompts prompts.txt --alpha 4 --format json",
    ),
)
@click.argument("model")
@click.argument("lock_reference", metavar="LOCK")
@click.option(
    "--prompt",
    "prompts",
    type=unicode_text,
    metavar="TEXT",
    multiple=True,
    help="A prompt; may be given several times.",
)
@click.option(
    "--prompts", "file", type=click.File(encoding="utf-8"), help="File of prompts, one per line; - for stdin."
)
@alpha_option
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest answer."
)
@system_prompt_option
@batch_size_option
@model_options
@format_option
@mlflow_options
def compare(
    model: str,
    lock_reference: str,
    prompts: tuple[str, ...],
    file: TextIO | None,
    alpha: float | None,
    max_new_tokens: int,
    system_prompt: str | None,
    batch_size: int,
    loading: ModelLoading,
    form: str,
    mlflow_address: MlflowAddress,
) -> None:
    """Answer prompts with MODEL as it is and with LOCK on it, side by side.

    MODEL is a local folder, a hub id or an MLflow URI of an unlocked model; LOCK a lock file or an MLflow
    URI. Answers are greedy, so the lock is the only difference. Nothing is saved.

    A negative alpha pushes the other way and shows what the lock holds back. That is for looking only: the
    gate never applies one.
    """
    asked = (*prompts, *lines_of(file, "--prompts"))
    if not asked:
        raise click.UsageError("Nothing to ask: give --prompt TEXT or --prompts FILE.")
    announce(f"Loading {model}")
    from mlflow_safelock.apply import compare as compare_answers

    if is_mlflow_model(model) or is_mlflow_model(lock_reference):
        mlflow_address.reach()
    lock = load_lock_reference(lock_reference)
    loaded = load_language_model(model, loading)
    strength = lock.metadata.default_alpha if alpha is None else alpha
    comparisons = compare_answers(
        loaded.model,
        loaded.tokenizer,
        asked,
        lock,
        strength,
        max_new_tokens=max_new_tokens,
        system_prompt=system_prompt,
        batch_size=batch_size,
        progress=True,
    )
    if form == "json":
        show_json(
            {
                "model": model,
                "lock": lock.digest,
                "alpha": strength,
                "comparisons": [asdict(comparison) for comparison in comparisons],
            }
        )
        return
    table = new_table(None, "prompt", "before", f"after (alpha {strength:g})")
    table.show_lines = True
    for comparison in comparisons:
        table.add_row(shown(comparison.prompt), shown(comparison.before), shown(comparison.after))
    show_table(table)
