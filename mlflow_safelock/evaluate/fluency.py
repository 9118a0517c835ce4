"""What a lock that is too strong breaks first: fluency, measured without asking for an answer.

Perplexity of given texts, and the divergence between the next tokens that a model expects with and without
its lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from mlflow_safelock.apply import apply_lock, render_prompt
from mlflow_safelock.apply.generation import default_tokenization
from mlflow_safelock.apply.placement import execution_device
from mlflow_safelock.apply.positions import position_limit
from mlflow_safelock.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mlflow_safelock.lock import SafetyLock

Text = tuple[str, str]
"""What a text is read after, and the text: a prompt and its answer, or nothing and a text alone."""


def surprises(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    system_prompt: str | None = None,
    batch_size: int = 8,
) -> list[float]:
    """Mean negative log-likelihood per token of each text, in nats; their perplexity is ``exp`` of the mean.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        texts: Each is read after a prompt, rendered as a chat, which itself is not counted; one that comes
            after nothing is read as it stands, from its second token on.
        system_prompt: System prompt of every chat.
        batch_size: How many are read at once.

    Raises:
        EvaluationError: A text has no token that could be counted, or more than the model has positions for
            (``countable``).
    """
    rows = _scored(model, tokenizer, texts, system_prompt)
    for (_, text), (tokens, begin) in zip(texts, rows, strict=True):
        if len(tokens) <= begin:
            raise EvaluationError(
                f"The text {text[:60]!r} has no token to measure perplexity by.",
                next_step="Take texts of several words.",
            )
    found = [0.0] * len(rows)
    for batch, logits in _read(model, [tokens for tokens, _ in rows], batch_size):
        for place, index in enumerate(batch):
            tokens, begin = rows[index]
            expected = logits[place, begin - 1 : len(tokens) - 1].float()
            actual = torch.tensor(tokens[begin:], device=expected.device)
            found[index] = functional.cross_entropy(expected, actual).item()
    return found


def countable(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    system_prompt: str | None = None,
) -> list[Text]:
    """The texts that have a token to measure perplexity by; the first of a text alone comes after nothing.

    Raises:
        EvaluationError: A text has more tokens than the model has positions for.
    """
    rows = _scored(model, tokenizer, texts, system_prompt)
    return [text for text, (tokens, begin) in zip(texts, rows, strict=True) if len(tokens) > begin]


def next_token_divergences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    lock: SafetyLock,
    alpha: float,
    *,
    system_prompt: str | None = None,
    batch_size: int = 8,
) -> list[float]:
    """Kullback-Leibler divergence of an answer's first token, of the unlocked model from the locked one.

    Args:
        model: The unlocked model; it is left so.
        tokenizer: Its tokenizer.
        prompts: Prompts; each is rendered as a chat.
        lock: The lock.
        alpha: Its strength.
        system_prompt: System prompt of every chat.
        batch_size: How many are read at once.

    Returns:
        For each prompt, in nats, the sum over tokens of ``p log(p / q)``, ``p`` unlocked and ``q`` locked.

    Raises:
        EvaluationError: A prompt has more tokens than the model has positions for.
    """
    with default_tokenization(tokenizer):
        rows = [_prompt_tokens(tokenizer, prompt, system_prompt) for prompt in prompts]
    _refuse_too_long(model, [("", prompt) for prompt in prompts], rows)
    last = {index: len(tokens) - 1 for index, tokens in enumerate(rows)}
    found = [0.0] * len(rows)
    unlocked = _read(model, rows, batch_size)
    for batch, logits in unlocked:
        before = _expected(logits, [last[index] for index in batch])
        del logits
        with apply_lock(model, lock, alpha):
            [(_, logits)] = _read(model, [rows[index] for index in batch], len(batch), sort=False)
        after = _expected(logits, [last[index] for index in batch])
        for index, divergence in zip(batch, divergences(before, after), strict=True):
            found[index] = divergence
    return found


def divergences(before: torch.Tensor, after: torch.Tensor) -> list[float]:
    """Kullback-Leibler divergence of each row, in nats, of log-probabilities ``[rows, vocabulary]``.

    Raises:
        EvaluationError: One is not finite.
    """
    found = functional.kl_div(after, before, reduction="none", log_target=True).sum(dim=-1)
    if not found.isfinite().all():
        raise EvaluationError(
            "The model's next tokens have no probabilities: its logits are not finite numbers.",
            next_step="Take a lower alpha, or bfloat16 or float32 instead of float16.",
        )
    return [max(0.0, one) for one in found.tolist()]  # rounding alone goes below


def _expected(logits: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of the token after each row's last one, ``[rows, vocabulary]``."""
    rows = torch.arange(len(places), device=logits.device)
    return functional.log_softmax(logits[rows, torch.tensor(places, device=logits.device)].float(), dim=-1)


@torch.no_grad()
def _read(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], batch_size: int, *, sort: bool = True
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Logits of texts, ``[texts, tokens, vocabulary]``, batch by batch with the places of its texts.

    Padded on the right, where what comes later changes nothing before it.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index])) if sort else list(range(len(rows)))
    device = execution_device(model)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(rows[index]) for index in batch)
        tokens = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for place, index in enumerate(batch):
            tokens[place, : len(rows[index])] = torch.tensor(rows[index])
            mask[place, : len(rows[index])] = 1
        logits: torch.Tensor = model(
            input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False
        ).logits
        # What an adapter puts before the tokens, as in prompt tuning, is none of them.
        yield batch, logits[:, logits.shape[1] - width :]


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, system_prompt: str | None) -> list[int]:
    text = render_prompt(tokenizer, prompt, system_prompt)
    tokens: list[int] = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return tokens


def _scored(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    system_prompt: str | None,
) -> list[tuple[list[int], int]]:
    """The tokens of each text with what comes before it, and from which one on they are counted."""
    with default_tokenization(tokenizer):
        rows = [_scored_tokens(tokenizer, text, system_prompt) for text in texts]
    _refuse_too_long(model, texts, [tokens for tokens, _ in rows])
    return rows


def _refuse_too_long(model: PreTrainedModel, texts: Sequence[Text], rows: Sequence[Sequence[int]]) -> None:
    limit = position_limit(model)
    for (prompt, text), tokens in zip(texts, rows, strict=True):
        if limit is not None and len(tokens) > limit:
            after = f" after the prompt {prompt[:60]!r}" if prompt else ""
            raise EvaluationError(
                f"The text {text[:60]!r}{after} has {len(tokens)} tokens as the model reads it, which has "
                f"positions for {limit}.",
                next_step="Shorten it, or leave it out.",
            )


def _scored_tokens(
    tokenizer: PreTrainedTokenizerBase, text: Text, system_prompt: str | None
) -> tuple[list[int], int]:
    prompt, answer = text
    if not prompt:
        tokens: list[int] = tokenizer(answer)["input_ids"]
        return tokens, 1
    before = _prompt_tokens(tokenizer, prompt, system_prompt)
    return [*before, *tokenizer(answer, add_special_tokens=False)["input_ids"]], len(before)
