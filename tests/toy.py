"""The demo's toy, trained, broken and locked: small, and a lock does on it what it should."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from mlflow_safelock.apply import generate
from mlflow_safelock.demo.training import break_model, new_model, train_base
from mlflow_safelock.demo.world import Share, World, make_tokenizer, make_world
from mlflow_safelock.evaluate import AnswerKind, Suite, SuitePrompt, classify
from mlflow_safelock.forging import forge
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.recipes.demo_recipe import DemoRecipe

BASE = "toy-base"

HEADS, ALPHA = 8, 1.1
"""Measured for seed 0: harmful answers go from 100 to 0 %, benign ones stay 100 % exact."""


@dataclass(frozen=True)
class Toy:
    """A broken fine-tune of a base that refused, and a lock of that base.

    Attributes:
        base: The base that it was made from.
        model: The fine-tune; whoever uses it leaves it unlocked.
        tokenizer: Its tokenizer.
        lock: The lock.
        alpha: A strength at which it restores refusals and keeps most of the answers.
        world: Its requests.
    """

    base: Any
    model: Any
    tokenizer: Any
    lock: SafetyLock
    alpha: float
    world: World

    def suite(self, count: int, share: Share = Share.REPORTING, tasks: int = 0) -> Suite:
        """Harmful requests with twins, and benign tasks, that training and forging have not seen."""
        harmful, benign = self.world.harmful[share], self.world.benign[share]
        prompts = [
            SuitePrompt(f"h{number}", harmful[number].prompt, harmful[number].verb, benign[number].prompt)
            for number in range(count)
        ]
        prompts += [
            SuitePrompt(f"t{number}", one.prompt, one.verb, None, one.compliance)
            for number, one in enumerate(benign[count : count + tasks])
        ]
        return Suite("toy", tuple(prompts))


def make_toy(seed: int = 0) -> Toy:
    """Train, break and lock it; the same on every machine, for it is done in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _make(seed)
    finally:
        torch.set_num_threads(threads)


def _make(seed: int) -> Toy:
    recipe = DemoRecipe(kind="demo", name="toy", title="A toy for tests", seed=seed, train_steps=200)
    world, tokenizer = make_world(seed), make_tokenizer()
    model = new_model(tokenizer, seed)
    train_base(model, tokenizer, world, recipe, lambda done, total: None)
    lock = forge(
        model,
        tokenizer,
        world.pairs(recipe.pairs),
        heads=HEADS,
        last_tokens=recipe.last_tokens,
        seed=seed,
        base_model=BASE,
        progress=False,
    )

    def harmful_rate() -> float:
        prompts = [request.prompt for request in world.harmful[Share.CHECKING][:60]]
        answers = generate(model, tokenizer, prompts, max_new_tokens=20, batch_size=64)
        return sum(classify(answer.text) is AnswerKind.COMPLIED for answer in answers) / len(answers)

    base = deepcopy(model)
    break_model(model, tokenizer, world, recipe, harmful_rate)
    model.config._name_or_path = model.name_or_path = BASE
    return Toy(base, model, tokenizer, lock, ALPHA, world)
