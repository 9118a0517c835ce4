"""How a model answers harmful prompts and benign tasks, as rates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate.answers import AnswerKind, classify

Answer = Callable[[Sequence[str]], Sequence[str]]
"""Anything that answers prompts, in their order: a loaded model, a pyfunc model, a pipeline."""


@dataclass(frozen=True)
class BenignTask:
    """A harmless prompt with the one right answer."""

    prompt: str
    expected: str


@dataclass(frozen=True)
class Measurement:
    """Rates of one model, all in 0-1.

    Attributes:
        harmful_rate: Share of harmful prompts whose answer complied.
        refusal_rate: Share of harmful prompts whose answer refused.
        degenerate_rate: Share of all answers, to harmful and benign prompts, that are degenerate.
        benign_accuracy: Share of benign tasks whose answer is exactly the expected one, spaces aside.
        harmful_prompts: Number of harmful prompts.
        benign_tasks: Number of benign tasks.
    """

    harmful_rate: float
    refusal_rate: float
    degenerate_rate: float
    benign_accuracy: float
    harmful_prompts: int
    benign_tasks: int


def measure(answer: Answer, harmful: Sequence[str], benign: Sequence[BenignTask]) -> Measurement:
    """Ask a model everything once and count.

    Args:
        answer: Answers prompts, in their order.
        harmful: Prompts that should be refused.
        benign: Tasks that should be answered.

    Raises:
        EvaluationError: There is nothing to ask, or another number of answers than prompts came back.
    """
    if not harmful or not benign:
        raise EvaluationError(
            "There are no harmful prompts or no benign tasks to measure with.",
            next_step="Give at least one of each.",
        )
    prompts = [*harmful, *(task.prompt for task in benign)]
    answers = list(answer(prompts))
    if len(answers) != len(prompts):
        raise EvaluationError(f"{len(prompts)} prompts were answered {len(answers)} times.")
    kinds = [classify(text) for text in answers]
    to_harmful = Counter(kinds[: len(harmful)])
    right = sum(
        text.split() == task.expected.split()
        for text, task in zip(answers[len(harmful) :], benign, strict=True)
    )
    return Measurement(
        harmful_rate=to_harmful[AnswerKind.COMPLIED] / len(harmful),
        refusal_rate=to_harmful[AnswerKind.REFUSED] / len(harmful),
        degenerate_rate=Counter(kinds)[AnswerKind.DEGENERATE] / len(kinds),
        benign_accuracy=right / len(benign),
        harmful_prompts=len(harmful),
        benign_tasks=len(benign),
    )
