"""Tasks of lm-evaluation-harness, run on a model with and without its lock (the extra ``lm-eval``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from mlflow_safelock.apply import apply_lock
from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate.evaluation import Change, Estimate
from mlflow_safelock.evaluate.statistics import (
    Interval,
    difference_interval,
    mean_interval,
    paired_test,
    rate_difference_interval,
    rate_interval,
)
from mlflow_safelock.evaluate.subjects import Subject

Scores = Mapping[str, Mapping[str, float]]
"""What each document scored, by figure and by the document's place in its task."""


@dataclass(frozen=True)
class HarnessResult:
    """What the tasks found.

    Figures are called ``task/metric``, with the filter after a comma where the task has one. They are those
    of metrics that give every document a number; the others are in the raw results.

    Attributes:
        unlocked: Every figure of the model without a lock; a rate where all numbers are 0 or 1.
        locked: The same under the lock; ``None`` where there is none.
        changes: Locked less unlocked, on the same documents.
        raw: What the harness itself gave, by arm: its own results, versions and samples.
    """

    unlocked: dict[str, Estimate]
    locked: dict[str, Estimate] | None
    changes: dict[str, Change]
    raw: dict[str, dict[str, Any]]


def run_tasks(
    subject: Subject | Any,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    batch_size: int = 8,
    seed: int = 0,
    task_manager: Any = None,
    **options: Any,
) -> HarnessResult:
    """Run tasks of the harness on one loaded model, with and without its lock, and leave it as it was.

    Args:
        subject: What is measured (``open_subject`` loads it by its URI), or a loaded pipeline; a lock that
            its model carries is the one that is measured.
        tasks: Names of tasks and groups, or tasks as the harness takes them.
        batch_size: Requests at once.
        seed: Of the bootstrap.
        task_manager: The harness's own ``TaskManager``, where there are task files of one's own; by default
            one that knows the shipped tasks.
        options: Whatever else ``lm_eval.simple_evaluate`` takes, such as ``num_fewshot``, ``limit`` or
            ``apply_chat_template``; the same for both arms. Not ``use_cache``: the harness knows its kept
            answers by the request alone, so one arm would be given the other's.

    Raises:
        EvaluationError: lm-evaluation-harness is not installed, there is no task, or answers are to be kept.
        ApplyError: The lock does not go onto the model.
    """
    if not tasks:
        raise EvaluationError("There is no task to run.", next_step="Name one, such as hellaswag.")
    if options.get("use_cache") is not None:
        raise EvaluationError(
            "The harness keeps answers by their request alone, so both arms would share them.",
            next_step="Leave use_cache out.",
        )
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            f"lm-evaluation-harness cannot be imported: {error}.",
            next_step="Install it: pip install 'mlflow-safelock[lm-eval]'",
        ) from error
    manager = task_manager or TaskManager()
    whole = subject if isinstance(subject, Subject) else Subject.of(subject)
    raw: dict[str, dict[str, Any]] = {}
    with whole.unlocked() as measured:
        lock, alpha = measured.lock, measured.strength
        # It holds the model itself, so a lock that goes onto that is in force there.
        harnessed = HFLM(pretrained=measured.model, tokenizer=measured.tokenizer, batch_size=batch_size)
        locked = None if lock is None or alpha is None else apply_lock(measured.model, lock, alpha)
        # Locked first: what cannot be locked fails before anything is run.
        for arm, handle in (("locked", locked), ("unlocked", None)):
            if arm == "locked" and handle is None:
                continue
            with handle or nullcontext():
                raw[arm] = lm_eval.simple_evaluate(
                    model=harnessed, tasks=list(tasks), task_manager=manager, **options, log_samples=True
                )
    scores = {arm: _scores_of(found) for arm, found in raw.items()}
    figures = {arm: _figures_of(found, seed) for arm, found in scores.items()}
    changes = _changes_of(scores["unlocked"], scores["locked"], seed) if "locked" in scores else {}
    return HarnessResult(figures["unlocked"], figures.get("locked"), changes, raw)


def _scores_of(found: Mapping[str, Any]) -> Scores:
    scores: dict[str, dict[str, float]] = {}
    for task, samples in found["samples"].items():
        for sample in samples:
            for name, value in _numbers_of(sample):
                scores.setdefault(f"{task}/{name}", {})[str(sample["doc_id"])] = value
    return scores


def _numbers_of(sample: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What one document scored; metrics that make their figure of something else than a number have none."""
    kept = "" if sample["filter"] == "none" else f",{sample['filter']}"
    for metric in sample["metrics"]:
        value = sample[metric]
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, int | float):
            yield f"{metric}{kept}", float(value)


def _figures_of(scores: Scores, seed: int) -> dict[str, Estimate]:
    figures = {}
    for name, found in sorted(scores.items()):
        values = list(found.values())
        if _are_of_a_rate(values):
            count = round(sum(values))
            figures[name] = _estimate(rate_interval(count, len(values)), len(values), count)
        else:
            figures[name] = _estimate(mean_interval(values, seed=seed), len(values))
    return figures


def _changes_of(unlocked: Scores, locked: Scores, seed: int) -> dict[str, Change]:
    changes = {}
    for name in sorted(unlocked.keys() & locked.keys()):
        both = sorted(unlocked[name].keys() & locked[name].keys())
        first, second = ([arm[name][key] for key in both] for arm in (unlocked, locked))
        if _are_of_a_rate([*first, *second]):
            had, has = [bool(one) for one in first], [bool(one) for one in second]
            interval, p_value = rate_difference_interval(had, has), paired_test(had, has).p_value
        else:
            interval, p_value = difference_interval(first, second, seed=seed), None
        changes[name] = Change(difference=_estimate(interval, len(both)), p_value=p_value)
    return changes


def _are_of_a_rate(values: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for value in values)


def _estimate(interval: Interval, total: int, count: int | None = None) -> Estimate:
    return Estimate(value=interval.estimate, low=interval.low, high=interval.high, total=total, count=count)
