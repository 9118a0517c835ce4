"""What is counted of a treated model's answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from mlflow_safelock.apply import apply_lock, generate
from mlflow_safelock.evaluate import AnswerKind, BenignTask, Rates, classify, measure, rate_interval
from mlflow_safelock.reproduction.arms import Treated
from mlflow_safelock.reproduction.world import Risk, Share, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANSWER_TOKENS = 20
BATCH = 128


@dataclass(frozen=True)
class Outcome:
    """Counts of one model's answers, or of several models' together.

    Attributes:
        harmful: How many harmful prompts were complied with.
        harmful_prompts: Number of harmful prompts.
        right: How many benign tasks were answered exactly right.
        benign_tasks: Number of benign tasks.
        degenerate: How many answers to both are degenerate.
        own_right: How many tasks that a fine-tune was made for, and its base refuses, were answered right.
        own_tasks: Number of these tasks; 0 for a fine-tune that has none.
    """

    harmful: int
    harmful_prompts: int
    right: int
    benign_tasks: int
    degenerate: int
    own_right: int
    own_tasks: int

    @property
    def rates(self) -> Rates:
        """The rates that a lock is chosen by."""
        asked = self.harmful_prompts + self.benign_tasks
        return Rates(
            self.harmful / self.harmful_prompts, self.right / self.benign_tasks, self.degenerate / asked
        )

    @classmethod
    def together(cls, outcomes: Iterable[Outcome]) -> Outcome:
        """The sum of several."""
        every = tuple(outcomes)
        return cls(*(sum(getattr(one, field.name) for one in every) for field in fields(cls)))

    def as_values(self) -> dict[str, Any]:
        """Every rate with its count and Wilson's interval, as plain values."""
        asked = self.harmful_prompts + self.benign_tasks
        counts = {
            "harmful_rate": (self.harmful, self.harmful_prompts),
            "benign_accuracy": (self.right, self.benign_tasks),
            "degenerate_rate": (self.degenerate, asked),
            "own_task_accuracy": (self.own_right, self.own_tasks),
        }
        return {name: _rate(count, total) for name, (count, total) in counts.items()}


def _rate(count: int, total: int) -> dict[str, Any] | None:
    if not total:
        return None
    found = rate_interval(count, total)
    return {
        "rate": found.estimate,
        "low": found.low,
        "high": found.high,
        "count": count,
        "total": total,
    }


@dataclass(frozen=True)
class Examiner:
    """Asks every model of one world the same.

    Attributes:
        tokenizer: The models' tokenizer.
        world: The requests.
    """

    tokenizer: PreTrainedTokenizerBase
    world: World

    def examine(self, treated: Treated, risk: Risk, share: Share, prompts: int) -> Outcome:
        """Ask a model harmful prompts, as many benign tasks, and as many of its own.

        Args:
            treated: The model; it is left as it was.
            risk: What it was fine-tuned on, which says how harmful prompts are put to it.
            share: Which requests are asked.
            prompts: How many of each.
        """
        harmful = [one.prompt for one in self.world.harmful_requests(risk, share, prompts)]
        benign = [BenignTask(one.prompt, one.compliance) for one in self.world.harmless[share][:prompts]]
        own = self.world.own_tasks(risk, share, prompts)

        def answers(asked: Sequence[str]) -> list[str]:
            return self._answers(treated.model, asked, treated.system_prompt)

        on = nullcontext() if treated.lock is None else apply_lock(treated.model, treated.lock, treated.alpha)
        with on:
            found = measure(answers, harmful, benign)
            said = answers([one.prompt for one in own]) if own else []
        return Outcome(
            harmful=round(found.harmful_rate * len(harmful)),
            harmful_prompts=len(harmful),
            right=round(found.benign_accuracy * len(benign)),
            benign_tasks=len(benign),
            degenerate=round(found.degenerate_rate * (len(harmful) + len(benign))),
            own_right=sum(
                text.split() == one.compliance.split() for text, one in zip(said, own, strict=True)
            ),
            own_tasks=len(own),
        )

    def unrefused_rate(self, model: PreTrainedModel, risk: Risk, share: Share, prompts: int) -> float:
        """The share of harmful requests that a model does not refuse."""
        asked = [one.prompt for one in self.world.harmful_requests(risk, share, prompts)]
        kinds = [classify(text) for text in self._answers(model, asked)]
        return 1.0 - kinds.count(AnswerKind.REFUSED) / len(kinds)

    def _answers(
        self, model: PreTrainedModel, prompts: Sequence[str], system_prompt: str | None = None
    ) -> list[str]:
        found = generate(
            model,
            self.tokenizer,
            prompts,
            system_prompt=system_prompt,
            max_new_tokens=ANSWER_TOKENS,
            batch_size=BATCH,
        )
        return [answer.text for answer in found]
