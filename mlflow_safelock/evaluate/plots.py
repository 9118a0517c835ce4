"""Pictures of an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from mlflow_safelock.evaluate.evaluation import Evaluation

COLOURS = {"unlocked": "tab:red", "locked": "tab:blue"}


def rates_plot(evaluation: Evaluation) -> Figure:
    """Every figure between 0 and 1 that counts prompts, of both arms, with its interval of 95 %."""
    arms = evaluation.arms
    names = [name for name, figure in evaluation.unlocked.figures.items() if figure.count is not None]
    figure = Figure(figsize=(7.5, 1.6 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, (arm, found) in enumerate(arms.items()):
        figures = [found.figures[name] for name in names]
        heights = [row + 0.2 * (2 * place - len(arms) + 1) for row in range(len(names))]
        axes.errorbar(
            [one.value for one in figures],
            heights,
            xerr=([one.value - one.low for one in figures], [one.high - one.value for one in figures]),
            fmt="o",
            capsize=3,
            color=COLOURS[arm],
            label=arm,
        )
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    strength = f", alpha {evaluation.lock.alpha:g}" if evaluation.lock else ""
    axes.set(xlim=(-0.02, 1.02), xlabel="share, with its 95 % interval")
    axes.set_title(f"{evaluation.model}: {evaluation.suite.name}{strength}")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    return figure


def category_plot(evaluation: Evaluation) -> Figure:
    """Share of harmful prompts that each arm complied with, category by category."""
    arms = tuple(evaluation.arms)
    harmful = [row for row in evaluation.rows if row.role == "harmful"]
    names = list(dict.fromkeys(row.category for row in harmful))
    figure = Figure(figsize=(7.5, 1.6 + 0.35 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, arm in enumerate(arms):
        shares = []
        for name in names:
            kinds = [getattr(row, arm).kind for row in harmful if row.category == name]
            shares.append(kinds.count("complied") / len(kinds))
        heights = [row + 0.2 * (2 * place - len(arms) + 1) for row in range(len(names))]
        axes.barh(heights, shares, height=0.36, color=COLOURS[arm], label=arm)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") or "all" for name in names])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="attack success rate", title=f"{evaluation.model}: {evaluation.suite.name}")
    axes.legend()
    return figure
