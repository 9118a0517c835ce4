"""A reproduction's figures as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mlflow_safelock.reproduction.arms import Arm
from mlflow_safelock.reproduction.world import Risk

Values = Mapping[str, Any]
"""What ``Reproduction.as_values`` gives, or what was read from the file of it."""


def markdown(values: Values) -> str:
    """All tables of a reproduction."""
    tables = (_arms, _risks, _unseen, _fine_tunes, _own_strengths, _overtrained, _seeds)
    return "\n\n".join(table(values) for table in tables) + "\n"


def _arms(values: Values) -> str:
    """Every arm over all fine-tunes."""
    rows = []
    for arm in Arm:
        found = values["arms"][arm.value]
        every = found["all"]
        rows.append(
            (
                arm.value,
                _interval(every["harmful_rate"]),
                "-" if arm is Arm.UNLOCKED else _percent(found["removed"]),
                _interval(every["benign_accuracy"]),
                "-" if arm is Arm.UNLOCKED else _points(found["benign_lost"]),
                _percent(every["degenerate_rate"]["rate"]),
                _percent(every["own_task_accuracy"]["rate"]),
            )
        )
    head = (
        *("all fine-tunes", "harmful", "added harm removed", "benign accuracy"),
        *("benign points lost", "degenerate", "own tasks right"),
    )
    return _table(head, rows)


def _risks(values: Values) -> str:
    """Every arm by what the fine-tunes were trained on."""
    rows = []
    for arm in Arm:
        by_risk = values["arms"][arm.value]["by_risk"]
        cells = [
            f"{_interval(by_risk[risk.value]['harmful_rate'])} / "
            f"{_percent(by_risk[risk.value]['benign_accuracy']['rate'])}"
            for risk in Risk
        ]
        rows.append((arm.value, *cells))
    return _table(("harmful / benign accuracy", *(risk.value for risk in Risk)), rows)


def _unseen(values: Values) -> str:
    """What every arm does to those fine-tunes that the one choice has not seen."""
    rows = []
    for arm in Arm:
        found = values["arms"][arm.value]["unseen"]
        rows.append((arm.value, _percent(found["removed"]), _points(found["benign_lost"])))
    head = ("fine-tunes that the choice did not see", "added harm removed", "benign points lost")
    return _table(head, rows[1:])


def _fine_tunes(values: Values) -> str:
    """Each kind of fine-tune before and after the lock at the one strength, over all seeds."""

    def seen(found: Sequence[Values]) -> list[str]:
        return ["yes" if found[0]["chosen_on"] else "no"]

    return _locked(values, Arm.LOCK, seen, "chosen on it")


def _own_strengths(values: Values) -> str:
    """Each kind of fine-tune before and after the lock at a strength that was chosen for it."""

    def strengths(found: Sequence[Values]) -> list[str]:
        own = [one["own_strength"] for one in found]
        return [
            ", ".join(f"{one['alpha']:g}" for one in own),
            ", ".join(str(one["accepted"]) for one in own),
        ]

    return _locked(values, Arm.OWN_LOCK, strengths, "alphas, by seed", "alphas accepted")


def _locked(values: Values, arm: Arm, more: Callable[[Sequence[Values]], list[str]], *head: str) -> str:
    """Each kind of fine-tune before and after an arm, over all seeds, with more columns of it."""
    groups: dict[tuple[str, int, str], list[Values]] = defaultdict(list)
    for seed in values["seeds"]:
        for one in seed["fine_tunes"]:
            groups[one["risk"], one["examples"], one["way"]].append(one)
    rows = []
    for (risk, examples, way), found in groups.items():
        before, after = (
            {
                name: _together(one["arms"][which.value][name] for one in found)
                for name in ("harmful_rate", "benign_accuracy", "degenerate_rate", "own_task_accuracy")
            }
            for which in (Arm.UNLOCKED, arm)
        )
        rows.append(
            (
                f"{risk}, {way}",
                str(examples),
                _percent(_together(one["base"]["harmful_rate"] for one in found)),
                *(f"{_percent(before[name])} → {_percent(after[name])}" for name in before),
                *more(found),
            )
        )
    first = (
        *(arm.value, "examples", "base, harmful", "harmful → locked", "benign accuracy → locked"),
        *("degenerate → locked", "own tasks → locked"),
    )
    return _table((*first, *head), rows)


def _overtrained(values: Values) -> str:
    """The first fine-tune, trained for longer, over all seeds."""
    groups: dict[float, list[Values]] = defaultdict(list)
    for seed in values["seeds"]:
        for one in seed["overtrained"]:
            groups[one["multiple"]].append(one)
    rows = []
    for multiple, found in groups.items():
        steps = sorted(one["steps"] for one in found)
        shares = (
            (
                _together(one[arm.value][name] for one in found)
                for arm in (Arm.UNLOCKED, Arm.LOCK, Arm.OWN_LOCK)
            )
            for name in ("harmful_rate", "benign_accuracy", "degenerate_rate")
        )
        rows.append(
            (
                f"{multiple:g} times as long",
                f"{steps[0]}–{steps[-1]}",
                *(" → ".join(map(_percent, three)) for three in shares),
                ", ".join(f"{one['own_strength']['alpha']:g}" for one in found),
            )
        )
    locked = "→ one strength → own"
    head = (
        *("first fine-tune, trained", "steps", f"harmful {locked}", f"benign accuracy {locked}"),
        *(f"degenerate {locked}", "alphas, by seed"),
    )
    return _table(head, rows)


def _seeds(values: Values) -> str:
    """The one lock of each seed; of removed harm and lost points, the one strength's and the own ones'."""
    rows = []
    for seed in values["seeds"]:
        lock = seed["lock"]
        layers = [layer for layer, _ in lock["heads"]]
        rows.append(
            (
                str(seed["seed"]),
                str(len(layers)),
                ", ".join(f"{layers.count(layer)} in layer {layer}" for layer in sorted(set(layers))),
                f"{lock['alpha']:g}",
                f"{lock['accepted']} of {lock['points']}",
                " / ".join(_percent(removed) for removed in seed["removed"].values()),
                " / ".join(_points(lost) for lost in seed["benign_lost"].values()),
                f"{seed['subtraction_scale']:g}",
            )
        )
    head = (
        *("seed", "heads", "where", "one alpha", "points accepted"),
        *("added harm removed, one / own strength", "benign points lost", "task vector's scale"),
    )
    return _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _together(rates: Iterable[Values | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    total = sum(rate["total"] for rate in known)
    return sum(rate["count"] for rate in known) / total if total else None


def _interval(rate: Values) -> str:
    low, high = (100 * rate[end] for end in ("low", "high"))
    return f"{_percent(rate['rate'])} ({low:.1f}–{high:.1f})"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f} %"


def _points(rate: float | None) -> str:
    # Plus zero, so that a loss of nothing has no sign.
    return "-" if rate is None else f"{100 * rate + 0.0:.1f}"
