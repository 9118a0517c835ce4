"""The policy that a sweep proposes: what it measured, and in words what it did not."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mlflow_safelock.cli.sweep_report import honest_figures

if TYPE_CHECKING:
    from mlflow_safelock.evaluate.choosing import Limits
    from mlflow_safelock.evaluate.exploring import Exploration
    from mlflow_safelock.evaluate.subjects import RegisteredVersion
    from mlflow_safelock.evaluate.suites import Suite
    from mlflow_safelock.forging import PreferencePair

FILL_IN = "# To be filled in: the registered model's name, for which this was measured, in place of '*'.\n"


def proposed_policy(
    found: Exploration,
    limits: Limits,
    suite: Suite,
    pairs: Sequence[PreferencePair],
    version: RegisteredVersion | None,
) -> str:
    """A policy, as YAML, for the version's registered model, that asks for a measurement of the whole suite.

    Each of its promotions then needs one that keeps the same limits, made in the same way. Where the sweep
    asked the whole suite, one of the same model, lock and strength keeps them.

    Args:
        found: What the sweep found; the chosen point keeps the limits on both halves.
        limits: The limits.
        suite: The whole suite.
        pairs: What the chosen lock may have been forged from; see ``known_prompts``.
        version: The version that was measured; ``None``: it is none.
    """
    import glob

    import yaml

    from mlflow_safelock.evaluate.forge_data import known_prompts, why_unknown

    lock = found.chosen.lock
    known = known_prompts(lock, suite, pairs)
    accepted = found.accepted(limits)
    rule = {
        "models": "*" if version is None else glob.escape(version.name),
        "alpha": {"default": found.chosen.alpha, "min": min(accepted), "max": max(accepted)},
        "evaluation": _evaluation(found, limits, suite, None if known is None else len(known)),
    }
    gates = yaml.safe_dump({"gates": [rule]}, sort_keys=False, allow_unicode=True)
    if version is None:
        gates = gates.replace("gates:\n", f"gates:\n{FILL_IN}", 1)
    words = _words(found, limits, suite, why_unknown(lock, pairs) if known is None else len(known))
    return "".join(f"# {line}\n" for line in words) + "version: 1\n" + gates


def _evaluation(found: Exploration, limits: Limits, suite: Suite, known: int | None) -> dict[str, Any]:
    from packaging.version import Version

    confirmed = found.confirmed
    wanted = {
        "suites": [_name_in_policy(suite)],
        "max_harmful_rate": limits.max_harmful_rate,
        "max_utility_drop": limits.max_utility_loss,
        "max_degenerate_rate": limits.max_degenerate_rate,
        "bound": "rate" if found.too_uncertain(limits) else "upper",
        "max_known_prompts": known,
        "judge": confirmed.judge.name,
        "system_prompt": confirmed.generation.system_prompt,
        "min_new_tokens": confirmed.generation.max_new_tokens,
        "dtypes": None if confirmed.generation.dtype is None else [confirmed.generation.dtype],
        "safelock_version": f">={Version(confirmed.tools['mlflow-safelock']).public}",
    }
    return {name: value for name, value in wanted.items() if value is not None}


def _words(found: Exploration, limits: Limits, suite: Suite, known: int | str) -> Iterator[str]:
    """What a reader of the policy has to know, in lines; ``known`` is a number, or why there is none."""
    lock, chosen_by, confirmed = found.chosen.lock, found.chosen.evaluation.suite, found.confirmed.suite
    base, name = (" ".join(text.split()) for text in (lock.base_model, suite.name))
    kept = ", ".join(f"{alpha:g}" for alpha in found.accepted(limits))
    yield f"{found.axes.label(lock)} of {base}, measured on {name}."
    yield f"The lock is to be registered: {lock.digest}."
    yield f"At alpha {found.chosen.alpha:g}, on the half that nothing was chosen by (95 % intervals):"
    yield f"{honest_figures(found)}."
    said = [
        f"Chosen from {len(found.tried)} points on the other half, whose figures are partly luck.",
        "The range is from the half that was chosen by, and was not measured again: there the harmful rate "
        f"is at most {limits.max_harmful_rate:g} at alpha {kept}.",
        *_what_was_not_shown(found, limits, known),
    ]
    asked = sum(half.prompts + half.tasks for half in (chosen_by, confirmed))
    if asked < len(suite.prompts):
        said.append(f"Of the suite's {len(suite.prompts)} prompts {asked} were asked; this asks for all.")
    for text in said:
        yield from textwrap.wrap(text, 100)


def _what_was_not_shown(found: Exploration, limits: Limits, known: int | str) -> Iterator[str]:
    """Where the policy is looser than it could be."""
    uncertain = found.too_uncertain(limits)
    if uncertain:
        ends = " and ".join(f"the {name} one's at {end:.1%}" for name, end in uncertain.items())
        yield (
            "bound is rate: the rates keep the limits, and their intervals of 95 % end above them, "
            f"{ends}; more prompts may show more."
        )
    if limits.max_utility_loss is None:
        yield "max_utility_drop is left out: any loss of utility is accepted, as in the sweep."
    if isinstance(known, str):
        yield f"max_known_prompts is left out: {known}."
    elif known:
        yield (
            f"max_known_prompts is {known}: of so many of the suite's prompts, or their twins, the lock was "
            "forged, and they say nothing of others."
        )
    yield (
        f"Measured by version {found.confirmed.tools['mlflow-safelock']} of mlflow-safelock; what later ones "
        "measure counts, too."
    )


def _name_in_policy(suite: Suite) -> str:
    """The name of a shipped suite, or the digest of another one."""
    from mlflow_safelock.evaluate import load_suite
    from mlflow_safelock.evaluate.suites import SHIPPED

    shipped = suite.name in SHIPPED and load_suite(suite.name).digest == suite.digest
    return suite.name if shipped else suite.digest
