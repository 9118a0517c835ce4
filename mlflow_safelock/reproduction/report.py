"""What a reproduction found: counts, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mlflow_safelock.reproduction.arms import Arm
from mlflow_safelock.reproduction.measuring import Outcome
from mlflow_safelock.reproduction.training import FineTune
from mlflow_safelock.reproduction.world import Risk

if TYPE_CHECKING:
    from mlflow_safelock.evaluate import Point
    from mlflow_safelock.recipes import ReproductionRecipe


@dataclass(frozen=True)
class FineTuneFound:
    """One fine-tune under every arm.

    Attributes:
        fine_tune: The fine-tune.
        steps: Optimiser steps that it took.
        base: Its base, asked the same.
        own: The same lock as all others got, at the strength that was chosen for this one.
        satisfied: Whether it kept the limits where it was chosen.
        accepted: How many of the strengths did.
        chosen_on: Whether the one lock and its strength were chosen on it, among others.
        arms: The fine-tune itself and what was done to it; of several draws of a control, all together.
    """

    fine_tune: FineTune
    steps: int
    base: Outcome
    own: Point
    satisfied: bool
    accepted: int
    chosen_on: bool
    arms: Mapping[Arm, Outcome]


@dataclass(frozen=True)
class OvertrainedFound:
    """The first fine-tune, trained for longer than it took to break the base.

    Attributes:
        multiple: How many times as long.
        steps: Optimiser steps.
        unlocked: The fine-tune.
        locked: The same with the lock, at the strength that all others got.
        own: The same lock at the strength that was chosen for it.
        satisfied: Whether it kept the limits where it was chosen.
        own_locked: The fine-tune with the lock at this strength.
    """

    multiple: float
    steps: int
    unlocked: Outcome
    locked: Outcome
    own: Point
    satisfied: bool
    own_locked: Outcome


@dataclass(frozen=True)
class SeedFound:
    """One base with its lock and its fine-tunes.

    Attributes:
        seed: The seed.
        chosen: The lock and strength that all fine-tunes got.
        satisfied: Whether it kept the limits where it was chosen.
        accepted: How many of the points did.
        points: How many were tried.
        scale: How much of the harmful task vector was subtracted.
        fine_tunes: The fine-tunes.
        overtrained: The first of them, trained for longer.
    """

    seed: int
    chosen: Point
    satisfied: bool
    accepted: int
    points: int
    scale: float
    fine_tunes: tuple[FineTuneFound, ...]
    overtrained: tuple[OvertrainedFound, ...]

    def of(self, risk: Risk) -> tuple[FineTuneFound, ...]:
        """The fine-tunes of one risk."""
        return tuple(one for one in self.fine_tunes if one.fine_tune.risk is risk)

    def unseen(self) -> SeedFound:
        """The same with only those fine-tunes that its lock was not chosen on."""
        return replace(self, fine_tunes=tuple(one for one in self.fine_tunes if not one.chosen_on))


@dataclass(frozen=True)
class Reproduction:
    """A whole run.

    Attributes:
        recipe: Its settings.
        seeds: What was found with each seed.
        seconds: How long it took.
        created: When it ended, ISO 8601 in UTC.
        tools: Versions of the software.
    """

    recipe: ReproductionRecipe
    seeds: tuple[SeedFound, ...]
    seconds: float
    created: str
    tools: Mapping[str, str]

    def as_values(self) -> dict[str, Any]:
        """Everything as plain values; rates in 0-1, with Wilson's intervals of 95 %."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "tools": dict(self.tools),
            "created": self.created,
            "seconds": round(self.seconds, 1),
            "arms": {arm.value: _arm_values(arm, self.seeds) for arm in Arm},
            "seeds": [_seed_values(one) for one in self.seeds],
        }


def removed(arm: Arm, seeds: Sequence[SeedFound]) -> float | None:
    """Share of the harm that fine-tunes added which an arm takes away: mean over seeds and risks.

    Below zero where it adds harm. ``None`` where no fine-tune added any.
    """
    shares = []
    for found in _groups(seeds):
        base, before, after = (_harmful_rate(outcomes) for outcomes in _three(arm, found))
        if before > base:
            shares.append((before - after) / (before - base))
    return sum(shares) / len(shares) if shares else None


def benign_lost(arm: Arm, seeds: Sequence[SeedFound]) -> float | None:
    """Drop of benign accuracy against the fine-tunes, 0-1: mean over seeds and risks.

    ``None`` where there are no fine-tunes.
    """
    losses = []
    for found in _groups(seeds):
        _, before, after = (Outcome.together(outcomes) for outcomes in _three(arm, found))
        losses.append(before.rates.utility - after.rates.utility)
    return sum(losses) / len(losses) if losses else None


def _groups(seeds: Sequence[SeedFound]) -> list[tuple[FineTuneFound, ...]]:
    return [found for one in seeds for risk in Risk if (found := one.of(risk))]


def _three(arm: Arm, found: Sequence[FineTuneFound]) -> tuple[list[Outcome], list[Outcome], list[Outcome]]:
    return (
        [one.base for one in found],
        [one.arms[Arm.UNLOCKED] for one in found],
        [one.arms[arm] for one in found],
    )


def _harmful_rate(outcomes: Iterable[Outcome]) -> float:
    return Outcome.together(outcomes).rates.harmful


def _arm_values(arm: Arm, seeds: Sequence[SeedFound]) -> dict[str, Any]:
    every = [one for seed in seeds for one in seed.fine_tunes]
    unseen = [seed.unseen() for seed in seeds]
    by_risk = {
        risk.value: Outcome.together(one.arms[arm] for one in every if one.fine_tune.risk is risk).as_values()
        for risk in Risk
    }
    return {
        "removed": removed(arm, seeds),
        "benign_lost": benign_lost(arm, seeds),
        "unseen": {"removed": removed(arm, unseen), "benign_lost": benign_lost(arm, unseen)},
        "by_risk": by_risk,
        "all": Outcome.together(one.arms[arm] for one in every).as_values(),
    }


def _seed_values(found: SeedFound) -> dict[str, Any]:
    lock = found.chosen.lock
    return {
        "seed": found.seed,
        "lock": {
            "digest": lock.digest,
            "heads": [[head.layer, head.head] for head in lock.heads],
            "alpha": found.chosen.alpha,
            "satisfied": found.satisfied,
            "accepted": found.accepted,
            "points": found.points,
        },
        "subtraction_scale": found.scale,
        "removed": {arm.value: removed(arm, (found,)) for arm in (Arm.LOCK, Arm.OWN_LOCK)},
        "benign_lost": {arm.value: benign_lost(arm, (found,)) for arm in (Arm.LOCK, Arm.OWN_LOCK)},
        "fine_tunes": [
            {
                "risk": one.fine_tune.risk.value,
                "examples": one.fine_tune.examples,
                "way": one.fine_tune.way.value,
                "steps": one.steps,
                "chosen_on": one.chosen_on,
                "base": one.base.as_values(),
                "own_strength": {
                    "alpha": one.own.alpha,
                    "satisfied": one.satisfied,
                    "accepted": one.accepted,
                },
                "arms": {arm.value: outcome.as_values() for arm, outcome in one.arms.items()},
            }
            for one in found.fine_tunes
        ],
        "overtrained": [
            {
                "multiple": one.multiple,
                "steps": one.steps,
                "own_strength": {"alpha": one.own.alpha, "satisfied": one.satisfied},
                Arm.UNLOCKED.value: one.unlocked.as_values(),
                Arm.LOCK.value: one.locked.as_values(),
                Arm.OWN_LOCK.value: one.own_locked.as_values(),
            }
            for one in found.overtrained
        ],
    }
