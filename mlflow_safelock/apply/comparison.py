"""What a lock changes, seen in a model's answers: before and after, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.progress import Progress

from mlflow_safelock.apply.generation import Answer, generate
from mlflow_safelock.apply.in_memory import apply_lock
from mlflow_safelock.lock import SafetyLock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Comparison:
    """A model's two answers to a prompt.

    Attributes:
        prompt: The prompt.
        before: The answer without the lock.
        after: The answer with it.
    """

    prompt: str
    before: str
    after: str


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    lock: SafetyLock,
    alpha: float = 6.0,
    *,
    max_new_tokens: int = 64,
    system_prompt: str | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> tuple[Comparison, ...]:
    """Answer prompts without and with a lock, greedily, and leave the model as it was.

    Args:
        model: An unlocked causal language model.
        tokenizer: Its tokenizer; its chat template is used if it has one.
        prompts: The prompts.
        lock: A lock of the model's base.
        alpha: Strength; a negative one shows what the lock holds back.
        max_new_tokens: Most tokens of an answer.
        system_prompt: System prompt of every chat.
        batch_size: How many prompts are answered at once.
        progress: Whether to show progress bars.

    Returns:
        One comparison for each prompt, in their order.

    Raises:
        AlphaError: Alpha is not a usable strength.
        AlreadyLockedError: The model carries a lock.
        ApplyError: A prompt cannot be rendered or is longer than the model can read, ``prompts`` is a single
            text, or a number is below 1.
        LockMismatchError: The lock is for another attention shape.
        UnsupportedArchitectureError: The model's attention heads are not known.
    """
    with Progress(disable=not progress) as bars:

        def answers(what: str) -> list[str]:
            task = bars.add_task(what, total=len(prompts))

            def advance(batch: Mapping[int, Answer]) -> None:
                bars.advance(task, len(batch))

            found = generate(
                model,
                tokenizer,
                prompts,
                system_prompt=system_prompt,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_batch=advance,
            )
            return [answer.text for answer in found]

        # Locked first: what cannot be locked fails before anything is generated.
        with apply_lock(model, lock, alpha):
            after = answers("With the lock")
        before = answers("Without it")
    return tuple(map(Comparison, prompts, before, after))
