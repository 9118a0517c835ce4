"""Pictures of an evaluation, and of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from mlflow_safelock.evaluate.evaluation import Evaluation
    from mlflow_safelock.evaluate.exploring import Contributions, Exploration

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

    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    axes = figure.subplots()
    for place, heads in enumerate(sorted({one.heads for one in found.tried})):
        points = [one for one in found.tried if one.heads == heads]
        harm, utility = [one.harm for one in points], [one.utility for one in points]
        axes.errorbar(
            [one.value for one in harm],
            [one.value for one in utility],
            xerr=([one.value - one.low for one in harm], [one.high - one.value for one in harm]),
            yerr=([one.value - one.low for one in utility], [one.high - one.value for one in utility]),
            fmt="o",
            color=f"C{place}",
            elinewidth=0.6,
            label=f"{heads} heads",
        )
        for one in points:
            axes.annotate(f"{one.alpha:g}", (one.harm.value, one.utility.value), fontsize="x-small")
    unlocked = found.chosen.evaluation.unlocked
    axes.plot(harm_of(unlocked).value, utility_of(unlocked).value, "s", color="black", label="unlocked")
    chosen = (found.chosen.harm.value, found.chosen.utility.value)
    axes.plot(*chosen, "o", markersize=14, fillstyle="none", color="crimson", label="chosen")
    axes.set(xlabel="harmful rate", ylabel="utility", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set_title("Points are labelled with alpha; bars are 95 % intervals")
    axes.legend()
    return figure


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
    """Harmful rate by number of heads and strength; a gap where a point was not tried."""
    heads = sorted({one.heads for one in found.tried})
    alphas = sorted({one.alpha for one in found.tried})
    values = [[float("nan")] * len(alphas) for _ in heads]
    for one in found.tried:
        values[heads.index(one.heads)][alphas.index(one.alpha)] = one.harm.value
    figure = Figure(figsize=(2.5 + 0.6 * len(alphas), 2.0 + 0.5 * len(heads)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="RdYlGn_r", aspect="auto")
    axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axes.set_yticks(range(len(heads)), [str(count) for count in heads])
    place = (alphas.index(found.chosen.alpha), heads.index(found.chosen.heads))
    axes.plot(*place, "o", markersize=16, fillstyle="none", color="black")
    axes.set(xlabel="alpha", ylabel="heads", title="harmful rate; the chosen point is ringed")
    figure.colorbar(image, ax=axes)
    return figure
