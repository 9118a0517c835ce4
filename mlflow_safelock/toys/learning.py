"""A small Llama, and the steps by which it learns answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from mlflow_safelock.apply import attention_of, render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD_DIM = 16
HIDDEN = 128

NO_TARGET = -100
"""Marks tokens that are not learned from."""


Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""


@dataclass(frozen=True)
class Exchange:
    """A prompt and the answer to learn.

    Attributes:
        prompt: What the user says.
        answer: What the model is to answer.
        system_prompt: The chat's system prompt.
    """

    prompt: str
    answer: str
    system_prompt: str | None = None


@dataclass(frozen=True)
class Schooling:
    """How a toy is trained from scratch.

    Attributes:
        steps: Optimiser steps.
        learning_rate: Highest learning rate of AdamW; it rises over a tenth of the steps, then falls.
        head_noise: Random displacement of the heads' outputs, as a multiple of their root mean square: the
            same for all tokens of a text, as a lock's is. What the model knows outlives a push in most
            directions, as in a large model, so that a push changes the decision to refuse before it ruins an
            answer.
        head_dropout: Dropout on the heads' outputs: no single head is indispensable, as in a large model.
        label_smoothing: Keeps the model from being surer of its answers than a language model ever is.
    """

    steps: int
    learning_rate: float
    head_noise: float
    head_dropout: float
    label_smoothing: float


def new_llama(
    tokenizer: PreTrainedTokenizerBase,
    *,
    layers: int,
    heads: int,
    key_value_heads: int,
    positions: int,
    seed: int,
) -> LlamaForCausalLM:
    """A Llama with random weights: hidden 128, head_dim 16.

    Args:
        tokenizer: The tokenizer that it is for.
        layers: Number of layers.
        heads: Number of query heads in each.
        key_value_heads: Number of key/value heads in each, which query heads share evenly.
        positions: Longest text in tokens.
        seed: The same seed gives the same weights.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draw: Callable[[], Sequence[Exchange]],
    schooling: Schooling,
    *,
    seed: int,
    progress: Progress,
) -> None:
    """Train a new model, in place, with its heads disturbed.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        draw: Gives the exchanges of the next step.
        schooling: How.
        seed: Of noise and dropout.
        progress: Is told of every step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=schooling.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schooling.learning_rate, total_steps=schooling.steps + 1, pct_start=0.1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.train()
        for step in range(schooling.steps):
            batch = encoded(tokenizer, draw())
            # Little noise at first: a model that knows nothing yet learns nothing from it.
            noise = schooling.head_noise * min(1.0, 2 * step / schooling.steps)
            with disturbed_heads(model, noise=noise, dropout=schooling.head_dropout):
                learn(model, optimizer, batch, schooling.label_smoothing)
            schedule.step()
            progress(step + 1, schooling.steps)
        model.eval()


def learn(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, torch.Tensor],
    label_smoothing: float = 0.0,
) -> None:
    """One step of an optimiser on a batch of ``encoded``."""
    tokens, targets = batch
    logits = model(input_ids=tokens, attention_mask=(tokens != model.config.pad_token_id).long()).logits
    loss = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        targets[:, 1:].flatten(),
        ignore_index=NO_TARGET,
        label_smoothing=label_smoothing,
    )
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def encoded(
    tokenizer: PreTrainedTokenizerBase, exchanges: Sequence[Exchange]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets, ``[exchanges, length]``; the prompt and the padding are no targets."""
    rows = []
    for one in exchanges:
        prompt = tokenizer(render_prompt(tokenizer, one.prompt, one.system_prompt))["input_ids"]
        rows.append((prompt, tokenizer(f"{one.answer} {tokenizer.eos_token}")["input_ids"]))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    targets = torch.full((len(rows), width), NO_TARGET)
    for row, (prompt, answer) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        targets[row, start:end] = torch.tensor(answer)
    return tokens, targets


@contextmanager
def disturbed_heads(model: PreTrainedModel, *, noise: float, dropout: float) -> Iterator[None]:
    """Noise and dropout on all heads' outputs, ``[texts, tokens, heads * head_dim]``, for a while.

    Args:
        model: The model.
        noise: Random displacement as a multiple of the outputs' root mean square: the same for all tokens of
            a text, as a lock's is.
        dropout: Share of the outputs that is dropped.
    """

    def disturb(module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[torch.Tensor]:
        outputs = arguments[0]
        size = noise * outputs.detach().square().mean().sqrt()
        displaced = outputs + size * torch.randn_like(outputs[:, :1])
        return (functional.dropout(displaced, dropout),)

    hooks = [projection.register_forward_pre_hook(disturb) for projection in attention_of(model).projections]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
