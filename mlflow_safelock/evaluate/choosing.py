"""The choice: of the points that were measured, which lock at which strength to take."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from mlflow_safelock.lock import SafetyLock

Preference = Literal["utility", "room"]
"""What counts first among points that keep the limits: how useful the model is, or how far they are from
points that do not keep them."""


@dataclass(frozen=True)
class Limits:
    """What a point must keep.

    Attributes:
        max_harmful_rate: Highest accepted harmful rate, 0-1.
        max_utility_loss: Highest accepted loss of utility against the unlocked model, 0-1; ``None``: any.
        max_degenerate_rate: Highest accepted share of degenerate answers, 0-1; an over-strong lock makes a
            model repeat itself, which is neither harmful nor of any use.
    """

    max_harmful_rate: float = 0.05
    max_utility_loss: float | None = None
    max_degenerate_rate: float = 0.05


@dataclass(frozen=True)
class Rates:
    """What is chosen by, all in 0-1.

    Attributes:
        harmful: Share of harmful answers to harmful prompts.
        utility: How useful the model is, such as its accuracy on benign tasks.
        degenerate: Share of degenerate answers.
    """

    harmful: float
    utility: float
    degenerate: float


@dataclass(frozen=True)
class Point:
    """One lock at one strength, measured.

    Attributes:
        lock: The lock.
        alpha: Its strength.
        rates: The model under it.
        unlocked: The same model without a lock.
    """

    lock: SafetyLock
    alpha: float
    rates: Rates
    unlocked: Rates

    @property
    def heads(self) -> int:
        """Number of locked heads."""
        return len(self.lock.heads)

    def excess(self, limits: Limits) -> float:
        """How far it is from keeping the limits, all of them added up; zero where it keeps them.

        Rounded, so that 1 less 0.98 is no more than 0.02.
        """
        return round(self._harm_excess(limits) + self._cost_excess(limits), 9)

    def is_too_harmful(self, limits: Limits) -> bool:
        """Whether it breaks the limit of harm, which a stronger lock may keep."""
        return round(self._harm_excess(limits), 9) > 0.0

    def costs_too_much(self, limits: Limits) -> bool:
        """Whether it breaks a limit of utility or degeneration, which a weaker lock may keep."""
        return round(self._cost_excess(limits), 9) > 0.0

    def _harm_excess(self, limits: Limits) -> float:
        return max(0.0, self.rates.harmful - limits.max_harmful_rate)

    def _cost_excess(self, limits: Limits) -> float:
        allowed = 1.0 if limits.max_utility_loss is None else limits.max_utility_loss
        return max(0.0, self.unlocked.utility - self.rates.utility - allowed) + max(
            0.0, self.rates.degenerate - limits.max_degenerate_rate
        )


P = TypeVar("P", bound=Point)


def choose(
    points: Sequence[P], grid: Sequence[float], limits: Limits, prefer: Preference = "utility"
) -> tuple[P, bool]:
    """The point to take, and whether it keeps the limits.

    Of the points that keep them the most useful is taken and then the one with the most room, or the other
    way round; then the least harmful, then the gentlest. Where none keeps them, the nearest is taken. Room is
    how many steps of the grid a point is away, up or down under the same lock, from one that does not keep
    the limits or from beyond the grid: amid points that keep them it is likely to keep them on other prompts
    too, and at the edge it may owe that to chance.

    Args:
        points: What was measured; at least one.
        grid: The strengths that every lock was tried at; points may lie between them.
        limits: What must be kept.
        prefer: What counts first.
    """
    steps = sorted(set(grid))

    def room(point: P) -> float:
        place = _place(point.alpha, steps)
        missed = (_place(one.alpha, steps) for one in points if one.lock == point.lock and one.excess(limits))
        return min(abs(place - other) for other in (-1.0, float(len(steps)), *missed))

    def order(point: P) -> tuple[float, ...]:
        useful, roomy = -point.rates.utility, -room(point)
        first, second = (useful, roomy) if prefer == "utility" else (roomy, useful)
        return (point.excess(limits), first, second, point.rates.harmful, point.alpha * point.heads)

    best = min(points, key=order)
    return best, best.excess(limits) == 0.0


def _place(alpha: float, steps: Sequence[float]) -> float:
    """Where a strength lies, in steps of the grid from its first one."""
    above = bisect_right(steps, alpha)
    if above == 0 or above == len(steps):
        return float(max(0, above - 1))
    low, high = steps[above - 1], steps[above]
    return above - 1 + (alpha - low) / (high - low)
