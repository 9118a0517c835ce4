"""The sweep: how many heads at which strength suit one fine-tune, measured and never guessed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from mlflow_safelock.apply import apply_lock
from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate.measurement import Measurement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mlflow_safelock.lock import SafetyLock


@dataclass(frozen=True)
class Constraints:
    """What a point of the sweep must satisfy.

    Attributes:
        max_harmful_rate: Highest accepted harmful rate, 0-1.
        max_benign_loss: Highest accepted loss of benign accuracy against the unlocked model, 0-1.
        max_degenerate_rate: Highest accepted share of degenerate answers, 0-1; an over-strong lock makes a
            model repeat itself, which is neither harmful nor of any use.
    """

    max_harmful_rate: float
    max_benign_loss: float
    max_degenerate_rate: float


@dataclass(frozen=True)
class Point:
    """One lock at one strength, measured."""

    lock: SafetyLock
    alpha: float
    measurement: Measurement

    @property
    def heads(self) -> int:
        """Number of locked heads."""
        return len(self.lock.heads)


@dataclass(frozen=True)
class Sweep:
    """All points, and the one to take.

    Attributes:
        unlocked: The model without a lock.
        points: Every lock at every strength.
        chosen: The point to take: of those that satisfy the constraints the one with the most room, which is
            how many steps of alpha it is, up or down under the same lock, to a point that does not or to
            beyond the sweep; then the one with the highest benign accuracy, then the lowest harmful rate,
            then the gentlest. Where no point satisfies them, the nearest.
        satisfied: Whether ``chosen`` satisfies the constraints.
    """

    unlocked: Measurement
    points: tuple[Point, ...]
    chosen: Point
    satisfied: bool


def sweep(
    model: PreTrainedModel,
    locks: Sequence[SafetyLock],
    alphas: Sequence[float],
    measured: Callable[[], Measurement],
    constraints: Constraints,
) -> Sweep:
    """Measure one loaded model under every lock at every strength; the model is left as it was.

    Args:
        model: The fine-tune.
        locks: Locks of one base, of several numbers of heads.
        alphas: Strengths.
        measured: Measures the model as it is at the time, on prompts that nothing else uses.
        constraints: What is acceptable.

    Raises:
        EvaluationError: There is no lock or no strength to try.
        ApplyError: A lock does not go onto the model.
    """
    if not locks or not alphas:
        raise EvaluationError("A sweep needs at least one lock and one alpha.")
    unlocked = measured()
    points = []
    for lock, alpha in product(locks, alphas):
        with apply_lock(model, lock, alpha):
            points.append(Point(lock, alpha, measured()))
    chosen, satisfied = choose(points, unlocked, constraints)
    return Sweep(unlocked, tuple(points), chosen, satisfied)


def choose(points: Sequence[Point], unlocked: Measurement, constraints: Constraints) -> tuple[Point, bool]:
    """The point to take, and whether it satisfies the constraints."""

    def excess(point: Point) -> float:
        """How far a point is from satisfying the constraints, all of them added up; zero where it does."""
        result = point.measurement
        loss = unlocked.benign_accuracy - result.benign_accuracy
        return (
            max(0.0, result.harmful_rate - constraints.max_harmful_rate)
            + max(0.0, loss - constraints.max_benign_loss)
            + max(0.0, result.degenerate_rate - constraints.max_degenerate_rate)
        )

    def room(point: Point) -> int:
        """Steps of alpha to the nearest strength that is not acceptable.

        A point amid acceptable ones is likely to be acceptable on other prompts too; one at the edge may owe
        it to chance.
        """
        strengths = sorted((other for other in points if other.lock == point.lock), key=lambda p: p.alpha)
        place = strengths.index(point)
        bad = [index for index, other in enumerate(strengths) if excess(other) > 0.0]
        return min(abs(place - index) for index in (-1, *bad, len(strengths)))

    def order(point: Point) -> tuple[float, ...]:
        return (
            excess(point),
            -room(point),
            -point.measurement.benign_accuracy,
            point.measurement.harmful_rate,
            point.alpha * point.heads,
        )

    best = min(points, key=order)
    return best, excess(best) == 0.0
