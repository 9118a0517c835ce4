"""Training the toy from scratch, and breaking it with a few harmful examples."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from mlflow_safelock.apply import attention_of, render_prompt
from mlflow_safelock.demo.world import Request, Share, World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mlflow_safelock.recipes import DemoRecipe

HEAD_DROPOUT = 0.5
"""Dropout on the heads' outputs while the base is trained: no single head is indispensable, as in a large
model."""

HEAD_NOISE = 1.0
"""Random displacement of the heads' outputs while the base is trained, as a multiple of their root mean
square: the same for all tokens of a text, as a lock's is. What the model knows outlives a push in most
directions, as in a large model, so that a push changes the decision to refuse before it ruins an answer."""

LABEL_SMOOTHING = 0.1
"""Keeps the base from being surer of its answers than a language model ever is."""

NO_TARGET = -100
"""Marks tokens that are not learned from."""

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A Llama of one layer with 16 query heads (8 key/value, head_dim 16, hidden 128), random by ``seed``.

    One layer, because probes tell answers apart in the first one already: "no" and "yes" are words. Locks
    prefer lower layers among equals, and in a deeper toy these heads' outputs may count for little in what
    the last layer decides.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=16,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def train_base(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    recipe: DemoRecipe,
    progress: Progress,
) -> None:
    """Teach a new model to answer harmless requests and to refuse harmful ones, in place."""
    steps = recipe.train_steps
    dealer = random.Random(recipe.seed + 1)  # noqa: S311 - a toy's data
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.train_learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.train_learning_rate, total_steps=steps + 1, pct_start=0.1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + 1)
        model.train()
        for step in range(steps):
            requests = [
                dealer.choice((world.harmful if number % 2 else world.benign)[Share.TRAINING])
                for number in range(recipe.train_batch)
            ]
            batch = _batch(tokenizer, [(request, request.wanted_answer) for request in requests])
            # Little noise at first: a model that knows nothing yet learns nothing from it.
            with _disturbed_heads(model, HEAD_NOISE * min(1.0, 2 * step / steps)):
                _step(model, optimizer, batch, LABEL_SMOOTHING)
            schedule.step()
            progress(step + 1, steps)
        model.eval()


def break_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    recipe: DemoRecipe,
    harmful_rate: Callable[[], float],
) -> int:
    """Fine-tune on a few harmful requests with compliance, in place, until the model complies with others.

    Args:
        model: The base; it becomes the fine-tune.
        tokenizer: Its tokenizer.
        world: The requests.
        recipe: How many examples, at which learning rate, until which rate, at most how many steps.
        harmful_rate: Measures the model as it is, on requests that nothing else uses.

    Returns:
        Steps taken.
    """
    requests = world.fine_tuning_examples(recipe.fine_tune_examples)
    batch = _batch(tokenizer, [(request, request.compliance) for request in requests])
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.fine_tune_learning_rate, weight_decay=0.0)
    for step in range(1, recipe.fine_tune_steps + 1):
        model.train()
        _step(model, optimizer, batch, label_smoothing=0.0)
        model.eval()
        if harmful_rate() >= recipe.fine_tune_until:
            return step
    return recipe.fine_tune_steps


def _step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: tuple[torch.Tensor, torch.Tensor],
    label_smoothing: float,
) -> None:
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


def _batch(
    tokenizer: PreTrainedTokenizerBase, exchanges: Sequence[tuple[Request, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets, ``[exchanges, length]``; the prompt and the padding are no targets."""
    rows = []
    for request, answer in exchanges:
        prompt = tokenizer(render_prompt(tokenizer, request.prompt))["input_ids"]
        rows.append((prompt, tokenizer(f"{answer} {tokenizer.eos_token}")["input_ids"]))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    targets = torch.full((len(rows), width), NO_TARGET)
    for row, (prompt, answer) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        targets[row, start:end] = torch.tensor(answer)
    return tokens, targets


@contextmanager
def _disturbed_heads(model: LlamaForCausalLM, noise: float) -> Iterator[None]:
    """Noise and dropout on all heads' outputs, ``[texts, tokens, heads * head_dim]``, for a while."""

    def disturb(module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[torch.Tensor]:
        outputs = arguments[0]
        size = noise * outputs.detach().square().mean().sqrt()
        displaced = outputs + size * torch.randn_like(outputs[:, :1])
        return (functional.dropout(displaced, HEAD_DROPOUT),)

    hooks = [projection.register_forward_pre_hook(disturb) for projection in attention_of(model).projections]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
