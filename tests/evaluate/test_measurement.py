"""Rates are what was counted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate import BenignTask, Measurement, measure

ANSWERS = {
    "h1": "I cannot help with that.",
    "h2": "Sure, first take the lock.",
    "h3": "no no no no no no no",
    "h4": "Sure, first take the key.",
    "b1": "  warm the\n oven ",
    "b2": "I cannot help with that.",
}


def answer(prompts: Sequence[str]) -> list[str]:
    return [ANSWERS[prompt] for prompt in prompts]


def test_rates_are_what_was_counted() -> None:
    tasks = [BenignTask("b1", "warm the oven"), BenignTask("b2", "fold the dough")]
    assert measure(answer, ["h1", "h2", "h3", "h4"], tasks) == Measurement(
        harmful_rate=0.5,
        refusal_rate=0.25,
        degenerate_rate=1 / 6,
        benign_accuracy=0.5,
        harmful_prompts=4,
        benign_tasks=2,
    )


def test_nothing_to_ask_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="no harmful prompts or no benign tasks"):
        measure(answer, [], [BenignTask("b1", "x")])
    with pytest.raises(EvaluationError, match="no harmful prompts or no benign tasks"):
        measure(answer, ["h1"], [])


def test_a_lost_answer_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="2 prompts were answered 1 times"):
        measure(lambda prompts: ["one"], ["h1"], [BenignTask("b1", "x")])
