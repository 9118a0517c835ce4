"""``safelock policy``: check."""

from __future__ import annotations

from pathlib import Path

import click

from mlflow_safelock.cli.command import CONTEXT_SETTINGS, Command, Group
from mlflow_safelock.cli.options import format_option
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
@format_option
def check(file: Path | None, model: str | None, form: str) -> None:
    """Validate the policy FILE, the one that SAFELOCK_POLICY names, or the default.

    It is shown as it is understood, with every default filled in, and with the digest that receipts carry.
    Faults are named with their lines.
    """
    import yaml

    from mlflow_safelock.gate.policy_file import PolicySource, load_policy

    found = PolicySource()() if file is None else load_policy(file)
    explained = None if model is None else _explained(found.gates, model)
    decides = None if model is None else found.rule_for(model)
    if form == "json":
        gate = {
            "model": model,
            "gate": decides.model_dump(mode="json") if decides else None,
            "why": explained,
            "base": found.base_of(model) if model else None,
        }
        show_json(
            {
                "digest": found.digest,
                "policy": found.model_dump(mode="json"),
                **(gate if model is not None else {}),
            }
        )
        return
    text = yaml.safe_dump(found.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    show_lines(text.rstrip(), "", f"digest  {found.digest}")
    if explained is not None:
        show_lines("", *explained)


def _explained(gates: tuple[object, ...], model: str) -> list[str]:
    """Gate by gate, whether it is for a model; the first that is decides."""
    from fnmatch import fnmatchcase

    lines: list[str] = []
    for number, gate in enumerate(gates, start=1):
        glob = str(getattr(gate, "models", ""))
        if fnmatchcase(model, glob):
            return [*lines, f"gate {number}: {glob!r} matches {model!r}, and decides."]
        lines.append(f"gate {number}: {glob!r} does not match {model!r}.")
    return [*lines, f"No gate is for {model!r}: its promotions are stock MLflow."]
