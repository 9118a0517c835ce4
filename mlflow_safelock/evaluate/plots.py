"""Pictures of an evaluation, and of a sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from mlflow_safelock.evaluate.evaluation import Evaluation
    from mlflow_safelock.evaluate.exploring import Contributions, Exploration, Tried

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


def pareto_plot(found: Exploration) -> Figure:
    """Harm against utility of every point with both intervals, the unlocked model, and what was chosen."""
    from mlflow_safelock.evaluate.evaluation import harm_of, utility_of

    figure = Figure(figsize=(9.5, 5.5), layout="constrained")
    axes = figure.subplots()
    colours = _colours(len(found.locks))
    labelled: Counter[tuple[float, float]] = Counter()
    for lock, colour in zip(found.locks, colours, strict=True):
        points = [one for one in found.tried if one.lock == lock]
        harm, utility = [one.harm for one in points], [one.utility for one in points]
        axes.errorbar(
            [one.value for one in harm],
            [one.value for one in utility],
            xerr=([one.value - one.low for one in harm], [one.high - one.value for one in harm]),
            yerr=([one.value - one.low for one in utility], [one.high - one.value for one in utility]),
            fmt="o",
            color=colour,
            elinewidth=0.6,
            label=found.axes.label(lock),
        )
        for where, alphas in _alphas_by_place(points).items():
            # Below each other, since locks often have points at the same place.
            offset = (5, 4 - 8 * labelled[where])
            labelled[where] += 1
            text = ", ".join(f"{alpha:g}" for alpha in alphas)
            axes.annotate(text, where, offset, textcoords="offset points", fontsize="x-small", color=colour)
    unlocked = found.chosen.evaluation.unlocked
    axes.plot(harm_of(unlocked).value, utility_of(unlocked).value, "s", color="black", label="unlocked")
    chosen = (found.chosen.harm.value, found.chosen.utility.value)
    axes.plot(*chosen, "o", markersize=14, fillstyle="none", color="crimson", label="chosen")
    axes.set(xlabel="harmful rate", ylabel="utility", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set_title(f"{len(found.tried)} points, labelled with alpha; bars are 95 % intervals")
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def _alphas_by_place(points: Sequence[Tried]) -> dict[tuple[float, float], list[float]]:
    places: dict[tuple[float, float], list[float]] = {}
    for one in points:
        places.setdefault((one.harm.value, one.utility.value), []).append(one.alpha)
    return places


def _colours(count: int) -> list[Any]:
    """So many colours that can be told apart."""
    if count <= 10:
        return [f"C{place}" for place in range(count)]
    return [colormaps["turbo"](place / (count - 1)) for place in range(count)]


def contributions_plot(found: Contributions) -> Figure:
    """The harmful rate without each head of a lock, with its interval of 95 %, beside the whole lock's."""
    from mlflow_safelock.evaluate.evaluation import harm_of

    figure = Figure(figsize=(7.0, 1.6 + 0.25 * len(found.without)), layout="constrained")
    axes = figure.subplots()
    harm = [harm_of(one.arm) for one in found.without]
    axes.errorbar(
        [one.value for one in harm],
        range(len(harm)),
        xerr=([one.value - one.low for one in harm], [one.high - one.value for one in harm]),
        fmt="o",
        capsize=2,
        color=COLOURS["locked"],
    )
    axes.axvline(harm_of(found.whole).value, color="black", linestyle="--", label="the whole lock")
    names = [f"layer {one.head.layer}, head {one.head.head}" for one in found.without]
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlim=(-0.02, 1.02), xlabel="harmful rate without the head")
    axes.set_title(f"{len(names)} heads at alpha {found.alpha:g}, each left out in turn")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    return figure


def heat_map(found: Exploration) -> Figure:
    """Harmful rate by lock and strength; a gap where a point was not tried."""
    locks = found.locks
    alphas = sorted({one.alpha for one in found.tried})
    values = [[float("nan")] * len(alphas) for _ in locks]
    for one in found.tried:
        values[locks.index(one.lock)][alphas.index(one.alpha)] = one.harm.value
    figure = Figure(figsize=(4.0 + 0.6 * len(alphas), 2.0 + 0.4 * len(locks)), layout="constrained")
    axes = figure.subplots()
    for one in found.tried:
        cell = (alphas.index(one.alpha), locks.index(one.lock))
        ink = "white" if abs(one.harm.value - 0.5) > 0.35 else "black"
        axes.annotate(f"{one.harm.value:.0%}", cell, ha="center", va="center", fontsize="small", color=ink)
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="RdYlGn_r", aspect="auto")
    axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axes.set_yticks(range(len(locks)), [found.axes.label(lock) for lock in locks])
    place = (alphas.index(found.chosen.alpha), locks.index(found.chosen.lock))
    axes.plot(*place, "o", markersize=26, markeredgewidth=2, fillstyle="none", color="deepskyblue")
    axes.set(xlabel="alpha", title=f"harmful rate of {len(found.tried)} points; the chosen one is ringed")
    figure.colorbar(image, ax=axes)
    return figure


PICTURES: Mapping[str, Callable[[Exploration], Figure | None]] = {
    "pareto": pareto_plot,
    "heat-map": heat_map,
    "per-head": lambda found: None if found.heads is None else contributions_plot(found.heads),
}
"""The pictures of a sweep, by name; ``None`` where there is nothing to be seen."""


def pictures_of(found: Exploration) -> dict[str, Figure]:
    """Those of ``PICTURES`` that there are."""
    drawn = {name: draw(found) for name, draw in PICTURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}
