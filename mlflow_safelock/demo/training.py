"""Training the toy from scratch, and breaking it with a few harmful examples."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from mlflow_safelock.demo.world import Share, World
from mlflow_safelock.toys import Exchange, Progress, Schooling, encoded, learn, new_llama, train

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from mlflow_safelock.recipes import DemoRecipe

HEAD_DROPOUT = 0.5
HEAD_NOISE = 1.0
LABEL_SMOOTHING = 0.1


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A Llama of one layer with 16 query heads (8 key/value, head_dim 16, hidden 128), random by ``seed``.

    One layer, because probes tell answers apart in the first one already: "no" and "yes" are words. Locks
    prefer lower layers among equals, and in a deeper toy these heads' outputs may count for little in what
    the last layer decides.
    """
    return new_llama(tokenizer, layers=1, heads=16, key_value_heads=8, positions=64, seed=seed)


def train_base(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    recipe: DemoRecipe,
    progress: Progress,
) -> None:
    """Teach a new model to answer harmless requests and to refuse harmful ones, in place."""
    dealer = random.Random(recipe.seed + 1)  # noqa: S311 - a toy's data

    def draw() -> list[Exchange]:
        requests = [
            dealer.choice((world.harmful if number % 2 else world.benign)[Share.TRAINING])
            for number in range(recipe.train_batch)
        ]
        return [Exchange(one.prompt, one.wanted_answer) for one in requests]

    schooling = Schooling(
        steps=recipe.train_steps,
        learning_rate=recipe.train_learning_rate,
        head_noise=HEAD_NOISE,
        head_dropout=HEAD_DROPOUT,
        label_smoothing=LABEL_SMOOTHING,
    )
    train(model, tokenizer, draw, schooling, seed=recipe.seed + 1, progress=progress)


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
    batch = encoded(tokenizer, [Exchange(one.prompt, one.compliance) for one in requests])
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.fine_tune_learning_rate, weight_decay=0.0)
    for step in range(1, recipe.fine_tune_steps + 1):
        model.train()
        learn(model, optimizer, batch)
        model.eval()
        if harmful_rate() >= recipe.fine_tune_until:
            return step
    return recipe.fine_tune_steps
