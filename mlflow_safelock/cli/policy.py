"""``safelock policy``: check."""

from __future__ import annotations

from pathlib import Path

import click

from mlflow_safelock.cli.command import CONTEXT_SETTINGS, Command, Group
from mlflow_safelock.cli.explained import show_explained
from mlflow_safelock.cli.guarded import (
    destination_option,
    explain,
    target_of,
    target_options,
    use_destination,
    version_of,
)
from mlflow_safelock.cli.options import MlflowAddress, format_option, mlflow_options, parse_settings
from mlflow_safelock.cli.output import announce, show_json, show_lines

_OVERRIDES = {
    "unlock": "Who may take a lock off",
    "revoke": "Who may revoke a lock",
    "other_alpha": "Who may promote with another alpha than the default",
}


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
        "safelock policy check safelock.yaml --version models:/support-bot/3 --stage Staging \\",
        "    --registry-uri safelock+postgresql://mlflow@db/mlflow",
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
@click.option(
    "--version",
    metavar="URI",
    callback=lambda context, parameter, uri: uri and version_of(context, parameter, uri),
    help="Explain the promotion of this version, such as models:/support-bot/3, with --stage or --alias.",
)
@target_options
@destination_option
@format_option
@mlflow_options
def check(
    file: Path | None,
    model: str | None,
    tags: dict[str, str],
    version: tuple[str, int] | None,
    stage: str | None,
    alias: str | None,
    artifacts_destination: str | None,
    form: str,
    mlflow_address: MlflowAddress,
) -> None:
    """Validate the policy FILE, the one that SAFELOCK_POLICY names, or the default.

    It is shown as it is understood, with every default filled in, and with the digest that receipts carry.
    Faults are named with their lines.

    With --version the promotion of a version is explained as FILE would decide it, on the registry's own
    database (--registry-uri safelock+...), and nothing is promoted or written: which gate, which base and who
    says so, which lock and alpha, what would be written, or why it would be refused. The exit code is then 1.
    """
    import yaml

    from mlflow_safelock.gate.policy_file import PolicySource, load_policy

    found = PolicySource()() if file is None else load_policy(file)
    if version is not None:
        use_destination(artifacts_destination)
        announce(f"Looking at {version[0]} version {version[1]}")
        show_explained(explain(mlflow_address, found, version, target_of(stage, alias)), form)
        return
    choice = None if model is None else found.choose(model, tags)
    if form == "json":
        shown: dict[str, object] = {"digest": found.digest, "policy": found.model_dump(mode="json")}
        shown["who_may"] = {key: str(who) for key, who in found.overrides.items()}
        if model is not None and choice is not None:
            shown["model"] = model
            shown["gate"] = choice.rule.model_dump(mode="json") if choice.rule else None
            shown["why"] = list(choice.steps)
            shown["base"] = found.base_of(model)
        show_json(shown)
        return
    text = yaml.safe_dump(found.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    show_lines(text.rstrip(), "", f"digest  {found.digest}")
    show_lines(*(f"{_OVERRIDES[key]}: {who}" for key, who in found.overrides.items()))
    if choice is not None:
        show_lines("", *choice.steps)
