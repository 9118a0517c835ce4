"""An explained promotion, shown."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from mlflow_safelock.cli.output import facts_table, show_json, show_lines, show_table

if TYPE_CHECKING:
    from mlflow_safelock.gate.explanation import Explanation

_OUTCOMES = {
    "lock": "it would be locked and promoted",
    "nothing to do": "it would be promoted as it is: it runs that lock already",
    "pass unlocked": "it would be promoted unlocked, as the policy allows",
    "refuse": "it would be refused",
    "not gated": "it would be promoted by stock MLflow: no gate is for that",
}


def show_explained(explained: Explanation, form: str) -> None:
    """Show what a promotion would do; one that would be refused ends the command with 1."""
    if form == "json":
        show_json(asdict(explained))
    else:
        _show(explained)
    if explained.refusal is not None:
        click.echo(f"Error: {explained.refusal.cause}", err=True)
        if explained.refusal.next_step:
            click.echo(f"Next: {explained.refusal.next_step}", err=True)
        click.get_current_context().exit(1)


def _show(explained: Explanation) -> None:
    base = explained.base and f"{explained.base}, says {explained.said_by}"
    alpha = explained.alpha and f"{explained.alpha:g}, {explained.alpha_from}"
    facts = [
        ("version", f"models:/{explained.model}/{explained.version}"),
        ("target", explained.target),
        ("outcome", _OUTCOMES[explained.outcome]),
        ("reason", explained.refusal and explained.refusal.reason),
        ("gate", explained.gate),
        ("source", explained.source),
        ("base", base),
        ("lock", explained.lock),
        ("lock digest", explained.lock_digest),
        ("alpha", alpha),
        ("kinship", None if explained.kinship is None else f"{explained.kinship:.4f}"),
        ("tokenizer", explained.tokenizer),
        ("own biases", explained.own_biases),
        ("carrier", explained.carrier),
    ]
    show_table(facts_table("Nothing was promoted", facts))
    show_lines("", *explained.why)
    if explained.writes:
        show_lines("", "The promotion would write:", *(f"  {what}" for what in explained.writes))
