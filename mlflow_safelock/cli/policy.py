"""``safelock policy``: check."""

from __future__ import annotations

from pathlib import Path

import click

from mlflow_safelock.cli.command import CONTEXT_SETTINGS, Command, Group
from mlflow_safelock.cli.options import format_option, parse_settings
from mlflow_safelock.cli.output import show_json, show_lines


@click.group(
    cls=Group,
    context_settings=CONTEXT_SETTINGS,
    examples=("safelock policy check safelock.yaml --model support-bot",),
)
def policy() -> None:
    """Look at a policy before it is in force."""


@policy.command(
    cls=Command,
    short_help="Validate a policy, and tell which gate is for a model.",
    examples=(
        "safelock policy check safelock.yaml",
        "safelock policy check safelock.yaml --model support-bot --format json",
    ),
)
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", metavar="NAME", help="Tell which gate decides over this registered model, and why.")
@click.option(
    "--tag",
    "tags",
    metavar="KEY=VALUE",
    multiple=True,
    callback=lambda _context, _parameter, pairs: parse_settings(pairs),
    help="With --model: a tag of the version; may be given several times.",
)
@format_option
def check(file: Path | None, model: str | None, tags: dict[str, str], form: str) -> None:
    """Validate the policy FILE, the one that SAFELOCK_POLICY names, or the default.

    It is shown as it is understood, with every default filled in, and with the digest that receipts carry.
    Faults are named with their lines.
    """
    import yaml

    from mlflow_safelock.gate.policy_file import PolicySource, load_policy

    found = PolicySource()() if file is None else load_policy(file)
    choice = None if model is None else found.choose(model, tags)
    if form == "json":
        shown = {"digest": found.digest, "policy": found.model_dump(mode="json")}
        if model is not None and choice is not None:
            shown["model"] = model
            shown["gate"] = choice.rule.model_dump(mode="json") if choice.rule else None
            shown["why"] = list(choice.steps)
            shown["base"] = found.base_of(model)
        show_json(shown)
        return
    text = yaml.safe_dump(found.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    show_lines(text.rstrip(), "", f"digest  {found.digest}")
    if choice is not None:
        show_lines("", *choice.steps)
