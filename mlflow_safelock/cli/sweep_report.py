"""What a sweep found, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_safelock.cli.output import new_table, show_lines, show_table

if TYPE_CHECKING:
    from mlflow_safelock.evaluate.choosing import Limits
    from mlflow_safelock.evaluate.evaluation import Arm, Estimate
    from mlflow_safelock.evaluate.exploring import Contributions, Exploration
    from mlflow_safelock.lock import SafetyLock


def warnings_of(found: Exploration, *, per_head: bool) -> list[str]:
    """What a reader has to know of any measurement, each once, with the points that it is of."""
    points: dict[str, list[str]] = {}
    for one in found.tried:
        for warning in one.evaluation.warnings:
            points.setdefault(warning, []).append(found.name(one))
    warnings = [
        warning if len(names) == len(found.tried) else f"{', '.join(names)}: {warning}"
        for warning, names in points.items()
    ]
    warnings += [f"The other half: {one}" for one in found.confirmed.warnings if one not in warnings]
    if found.heads is not None:
        failures = sum(one.arm.judge_failures for one in found.heads.without)
        if failures:
            warnings.append(f"The judge came to no verdict on {failures} answers without one head.")
    elif per_head:
        warnings.append("The chosen lock has one head, so none could be left out (--per-head).")
    if any("no verdict" in warning for warning in warnings):
        warnings.append("Here answers without a verdict count as harmful.")
    return warnings


def facts_of(
    found: Exploration,
    limits: Limits,
    warnings: list[str],
    lock_file: Path | None,
    same: dict[str, SafetyLock],
) -> dict[str, Any]:
    """Everything, for programs; docs/cli.md says what is what."""
    from mlflow_safelock.evaluate.axes import settings_of

    confirmed = found.confirmed
    return {
        "points_compared": len(found.tried),
        "satisfied": found.satisfied,
        "confirmed_keeps_the_limits": found.holds(limits),
        "chosen": {
            "heads": found.chosen.heads,
            **settings_of(found.chosen.lock),
            "alpha": found.chosen.alpha,
            "lock": found.chosen.lock.digest,
            "lock_file": lock_file and str(lock_file),
            "accepted_alphas": found.accepted(limits) if found.satisfied else (),
        },
        "limits": {
            "max_harmful_rate": limits.max_harmful_rate,
            "max_utility_loss": limits.max_utility_loss,
            "max_degenerate_rate": limits.max_degenerate_rate,
        },
        "points": [
            {
                "heads": one.heads,
                **settings_of(one.lock),
                "lock": one.lock.digest,
                "alpha": one.alpha,
                "keeps_the_limits": one.excess(limits) == 0.0,
                "figures": {name: figure.model_dump() for name, figure in one.arm.figures.items()},
                "judge_failures": one.arm.judge_failures,
                "warnings": one.evaluation.warnings,
            }
            for one in found.tried
        ],
        "same_locks": {digest: lock.digest for digest, lock in same.items()},
        "per_head": found.heads
        and [
            {
                "layer": one.head.layer,
                "head": one.head.head,
                "figures_without": {name: figure.model_dump() for name, figure in one.arm.figures.items()},
                "judge_failures": one.arm.judge_failures,
            }
            for one in found.heads.without
        ],
        "unlocked": {
            name: figure.model_dump() for name, figure in found.chosen.evaluation.unlocked.figures.items()
        },
        "unlocked_judge_failures": found.chosen.evaluation.unlocked.judge_failures,
        "warnings": warnings,
        "chosen_by": found.chosen.evaluation.suite.model_dump(mode="json"),
        "confirmed": confirmed.model_dump(mode="json", exclude={"rows", "source"}),
    }


def show_found(found: Exploration, limits: Limits) -> None:
    """The points, and what the other half of the suite says of the chosen one."""
    from mlflow_safelock.evaluate.evaluation import harm_of, utility_of

    axes = [name.replace("_", " ") for name in found.axes.found]
    table = new_table(None, "heads", *axes, "alpha", "harmful", "degenerate", "utility", "keeps the limits")
    rows = [(["-" for _ in ("heads", *axes, "alpha")], found.chosen.evaluation.unlocked, "-")]
    rows += [
        (
            [str(one.heads), *found.axes.values(one.lock).values(), f"{one.alpha:g}"],
            one.arm,
            "no" if one.excess(limits) else "yes",
        )
        for one in found.tried
    ]
    for place, arm, kept in rows:
        figures = (harm_of(arm), arm.figures["degenerate_rate"], utility_of(arm))
        table.add_row(*place, *(_cell(figure) for figure in figures), kept)
    show_table(table)
    if found.heads is not None:
        _show_heads(found.heads)
    if found.satisfied:
        point = found.name(found.chosen)
        holds = found.holds(limits)
        show_lines(
            "",
            f"Take {point}." if holds else f"{point} do not keep the limits on the other half of the suite.",
            f"On the other half of the suite: {honest_figures(found)}; "
            f"unlocked: {_harm_and_utility(found.confirmed.unlocked)}.",
            _compared(found),
        )


def _compared(found: Exploration) -> str:
    """What a reader has to know who looks at the best of many."""
    count = len(found.tried)
    if count == 1:
        return "The figures in the table are of the half that was chosen by, these are of the other."
    return (
        f"The point is the best of {count}, so its figures in the table are partly luck; those of the other "
        "half are the honest ones."
    )


def about_locks(forged: tuple[SafetyLock, ...], same: dict[str, SafetyLock]) -> Iterator[str]:
    """Which locks were not measured, since others push the same heads."""
    from mlflow_safelock.evaluate.axes import Axes

    axes = Axes.between(forged)
    twins: dict[str, list[str]] = {}
    for lock in forged:
        if lock.digest in same:
            twins.setdefault(axes.label(same[lock.digest]), []).append(axes.label(lock))
    for first, others in twins.items():
        yield f"The same heads as {first}, and not measured again: {'; '.join(others)}."


def _show_heads(found: Contributions) -> None:
    from mlflow_safelock.evaluate.evaluation import harm_of, utility_of

    table = new_table(f"Without one head, at alpha {found.alpha:g}", "layer", "head", "harmful", "utility")
    table.add_row("-", "-", _cell(harm_of(found.whole)), _cell(utility_of(found.whole)))
    for one in found.without:
        figures = (harm_of(one.arm), utility_of(one.arm))
        table.add_row(str(one.head.layer), str(one.head.head), *(_cell(figure) for figure in figures))
    show_table(table)


def honest_figures(found: Exploration) -> str:
    """The chosen point's figures on the half that nothing was chosen by."""
    arm = found.confirmed.locked
    assert arm is not None
    return f"{_harm_and_utility(arm)}, degenerate {_cell(arm.figures['degenerate_rate'])}"


def _harm_and_utility(arm: Arm) -> str:
    from mlflow_safelock.evaluate.evaluation import harm_of, utility_of

    return f"harmful {_cell(harm_of(arm))}, utility {_cell(utility_of(arm))}"


def _cell(figure: Estimate) -> str:
    return f"{figure.value:.1%} ({figure.low:.1%} to {figure.high:.1%})"
