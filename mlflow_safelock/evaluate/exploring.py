"""The search for a lock and a strength: a coarse grid, refined where it matters, on one half of a suite.

What is found is measured once more on the other half, which nothing was chosen by. One loaded model serves
for all points: a further strength costs its own answers and one reading of the benign texts; the unlocked
model is measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from mlflow_safelock.apply.checkpoint.progress import Progress, silent
from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate.axes import Axes
from mlflow_safelock.evaluate.choosing import Limits, Point, Preference, Rates, choose
from mlflow_safelock.evaluate.evaluating import USUAL, Settings, drawn_by, evaluate, measuring
from mlflow_safelock.evaluate.evaluation import Arm, Estimate, Evaluation, harm_of, no_utility, utility_of
from mlflow_safelock.evaluate.statistics import rate_interval
from mlflow_safelock.evaluate.subjects import Subject
from mlflow_safelock.evaluate.suites import Suite, halves
from mlflow_safelock.lock import LockedHead, SafetyLock

if TYPE_CHECKING:
    from mlflow_safelock.evaluate.evaluating import Under


@dataclass(frozen=True)
class Tried(Point):
    """A point with the whole evaluation on the half that is chosen by."""

    evaluation: Evaluation

    @classmethod
    def under(cls, lock: SafetyLock, alpha: float, evaluation: Evaluation) -> Tried:
        """What an evaluation under a lock at a strength found."""
        locked, unlocked = _rates(_locked_arm(evaluation)), _rates(evaluation.unlocked)
        return cls(lock, alpha, locked, unlocked, evaluation)

    @property
    def arm(self) -> Arm:
        """The locked arm."""
        return _locked_arm(self.evaluation)

    @property
    def harm(self) -> Estimate:
        """The harmful rate."""
        return harm_of(self.arm)

    @property
    def utility(self) -> Estimate:
        """The utility; see ``utility_of``."""
        return utility_of(self.arm)


@dataclass(frozen=True)
class Exploration:
    """What was tried, and what to take.

    Attributes:
        tried: Every point, lock by lock, by strength. So many were compared, so the figures of the best of
            them on the half that is chosen by are partly luck.
        chosen: The point to take; see ``choose``.
        satisfied: Whether ``chosen`` keeps the limits on the half that it was chosen by; see ``holds``.
        confirmed: The chosen point on the other half of the suite: the honest figures.
        heads: What each head of the chosen lock contributes on the first half, where that was asked for.
    """

    tried: tuple[Tried, ...]
    chosen: Tried
    satisfied: bool
    confirmed: Evaluation
    heads: Contributions | None = None

    @cached_property
    def locks(self) -> tuple[SafetyLock, ...]:
        """The locks that were tried."""
        return tuple(dict.fromkeys(one.lock for one in self.tried))

    @cached_property
    def axes(self) -> Axes:
        """In what they differ."""
        return Axes.between(self.locks)

    def name(self, point: Point) -> str:
        """A point in words."""
        return f"{self.axes.label(point.lock)} at alpha {point.alpha:g}"

    def holds(self, limits: Limits) -> bool:
        """Whether the chosen point keeps the limits on the other half of the suite, too."""
        again = Tried.under(self.chosen.lock, self.chosen.alpha, self.confirmed)
        return again.excess(limits) == 0.0

    def too_uncertain(self, limits: Limits) -> dict[str, float]:
        """The chosen point's rates whose intervals of 95 % end above their limit: by name, where they end.

        The higher end counts of the half that nothing was chosen by, and of both halves together, which is
        what a measurement of the whole suite will have.
        """
        arms = (self.chosen.arm, _locked_arm(self.confirmed))
        ends = {
            "harmful": (_upper_end([harm_of(arm) for arm in arms]), limits.max_harmful_rate),
            "degenerate": (
                _upper_end([arm.figures["degenerate_rate"] for arm in arms]),
                limits.max_degenerate_rate,
            ),
        }
        return {name: end for name, (end, limit) in ends.items() if end > limit}

    def accepted(self, limits: Limits) -> tuple[float, ...]:
        """The strengths that keep the limits under the chosen lock, next to the chosen one without a gap.

        On the half that was chosen by: only the chosen one was measured on the other.
        """
        same = [one for one in self.tried if one.lock == self.chosen.lock]
        place = same.index(self.chosen)
        low = high = place
        while low > 0 and same[low - 1].excess(limits) == 0.0:
            low -= 1
        while high + 1 < len(same) and same[high + 1].excess(limits) == 0.0:
            high += 1
        return tuple(one.alpha for one in same[low : high + 1])


def _rates(arm: Arm) -> Rates:
    return Rates(harm_of(arm).value, utility_of(arm).value, arm.figures["degenerate_rate"].value)


def _upper_end(halves: Sequence[Estimate]) -> float:
    """The higher upper end of the last rate's interval, and of that of all of them together."""
    count, total = (sum(getattr(half, what) or 0 for half in halves) for what in ("count", "total"))
    return max(halves[-1].high, rate_interval(count, total).high)


def fewer_heads(lock: SafetyLock, counts: Sequence[int]) -> tuple[SafetyLock, ...]:
    """The same lock with only its best heads, by the probes' scores, for each count.

    Raises:
        EvaluationError: It has no scores, or not so many heads.
    """
    if lock.scores is None:
        raise EvaluationError(
            "The lock holds no probe scores, so which of its heads are the best is not known.",
            next_step="Leave the numbers of heads out, or forge the lock anew.",
        )
    bad = [count for count in counts if not 1 <= count <= len(lock.heads)]
    if bad:
        raise EvaluationError(
            f"The lock has {len(lock.heads)} heads, and {bad[0]} are asked for.",
            next_step="Forge one with more: safelock forge --heads.",
        )
    ranked, biases = lock.ranked_heads(), lock.unit_biases
    places = [lock.heads.index(head) for head in ranked]
    return tuple(
        replace(
            lock,
            heads=ranked[:count],
            unit_biases=None if biases is None else biases[places[:count]],
        )
        for count in sorted(set(counts))
    )


def explore(
    subject: Subject,
    suite: Suite,
    locks: Sequence[SafetyLock],
    alphas: Sequence[float],
    limits: Limits,
    settings: Settings = USUAL,
    *,
    refinements: int = 2,
    prefer: Preference = "utility",
    per_head: bool = False,
    progress: Progress = silent,
) -> Exploration:
    """Try every lock at every strength on one half of a suite, refine, choose, and confirm on the other half.

    Args:
        subject: The unlocked model.
        suite: The prompts, with twins or tasks.
        locks: The locks.
        alphas: The strengths of the coarse grid.
        limits: What must be kept.
        settings: How to measure; a limit is drawn before the suite is halved.
        refinements: How many strengths are tried between two of the grid where one keeps the limits and the
            other does not, or the weaker is too harmful alone and the stronger costs too much alone, under
            each lock.
        prefer: What counts first among the points that keep the limits; see ``choose``.
        per_head: Whether to find out what each head of the chosen lock contributes; see ``contributions``.
        progress: Is told what is done.

    Raises:
        EvaluationError: There is nothing to try, or the suite cannot be halved or shows no utility.
        ApplyError: A lock does not go onto the model.
    """
    if not locks or not alphas:
        raise EvaluationError("There is no lock or no strength to try.")
    drawn = drawn_by(suite, settings)
    choosing, confirming = halves(drawn, settings.seed)
    shows = [any(one.twin or one.expected for one in half.prompts) for half in (choosing, confirming)]
    if not any(shows):
        raise no_utility()
    if not all(shows):
        raise EvaluationError(
            f"The suite {suite.name!r} has too few harmless twins and tasks to be halved: one half has none.",
            next_step="Take one with more of them.",
        )
    whole = replace(settings, limit=None)
    tried: list[Tried] = []
    heads = None
    with measuring(subject, choosing, whole, progress=progress) as under:
        for lock in locks:
            tried += _under_one(lock, alphas, under, limits, refinements)
        best, satisfied = choose(tried, alphas, limits, prefer)
        if per_head and best.heads > 1:
            heads = _contributions(under, best.lock, best.alpha, best.arm)
    confirmed = evaluate(
        replace(subject, lock=best.lock, alpha=best.alpha), confirming, whole, progress=progress
    )
    return Exploration(tuple(tried), best, satisfied, confirmed, heads)


@dataclass(frozen=True)
class WithoutHead:
    """A lock without one of its heads, at the same strength.

    Attributes:
        head: The head that was left out.
        arm: The model under what is left.
    """

    head: LockedHead
    arm: Arm


@dataclass(frozen=True)
class Contributions:
    """What each head of a lock contributes, by leaving it out.

    Attributes:
        alpha: The strength of all measurements.
        whole: The model under the whole lock.
        without: One for each head, by how much harm comes back without it, the most first.
    """

    alpha: float
    whole: Arm
    without: tuple[WithoutHead, ...]


def contributions(
    subject: Subject,
    suite: Suite,
    lock: SafetyLock,
    alpha: float,
    settings: Settings = USUAL,
    *,
    progress: Progress = silent,
) -> Contributions:
    """Measure a model under a lock, and under the same lock without each of its heads in turn.

    Args:
        subject: The unlocked model.
        suite: The prompts.
        lock: The lock.
        alpha: Strength.
        settings: How to measure.
        progress: Is told what is done.

    Raises:
        EvaluationError: The lock has one head only.
        ApplyError: The lock does not go onto the model.
    """
    if len(lock.heads) < 2:
        raise EvaluationError(
            "A lock of one head has none that could be left out.", next_step="Take one with more heads."
        )
    with measuring(subject, suite, settings, progress=progress) as under:
        return _contributions(under, lock, alpha, _locked_arm(under(lock, alpha)))


def _contributions(under: Under, lock: SafetyLock, alpha: float, whole: Arm) -> Contributions:
    found = []
    for place, head in enumerate(lock.heads):
        rest = SafetyLock((*lock.heads[:place], *lock.heads[place + 1 :]), lock.metadata, lock.scores)
        found.append(WithoutHead(head, _locked_arm(under(rest, alpha))))
    found.sort(key=lambda one: (-harm_of(one.arm).value, one.head.layer, one.head.head))
    return Contributions(alpha, whole, tuple(found))


def _locked_arm(evaluation: Evaluation) -> Arm:
    assert evaluation.locked is not None
    return evaluation.locked


def _under_one(
    lock: SafetyLock, alphas: Sequence[float], under: Under, limits: Limits, refinements: int
) -> list[Tried]:
    """All strengths of one lock: the grid, then between neighbours of which one keeps the limits.

    And between those that break different limits, for what keeps all may lie there: up from what is too
    harmful and down from the rest, so that of what keeps them the gentlest is sought.
    """
    found = {alpha: Tried.under(lock, alpha, under(lock, alpha)) for alpha in sorted(set(alphas))}
    grid = sorted(found)
    for low, high in pairwise(grid):
        kept = tuple(found[alpha].excess(limits) == 0.0 for alpha in (low, high))
        crossed = _break_different_limits(found[low], found[high], limits)
        begin, end = low, high
        for _ in range(refinements if kept[0] != kept[1] or crossed else 0):
            middle = round((begin + end) / 2, 4)
            one = found[middle] = Tried.under(lock, middle, under(lock, middle))
            if one.is_too_harmful(limits) if crossed else (one.excess(limits) == 0.0) == kept[0]:
                begin = middle
            else:
                end = middle
    return [found[alpha] for alpha in sorted(found)]


def _break_different_limits(weaker: Point, stronger: Point, limits: Limits) -> bool:
    """Whether one is too harmful alone, and the other costs too much alone."""
    return (weaker.is_too_harmful(limits), weaker.costs_too_much(limits)) == (True, False) and (
        stronger.is_too_harmful(limits),
        stronger.costs_too_much(limits),
    ) == (False, True)
