"""The base of a reproduction, and its fine-tunes: all weights, or an adapter that is merged in the end."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.reproduction.world import Risk, World
from mlflow_safelock.toys import Exchange, Progress, Schooling, encoded, learn, new_llama, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mlflow_safelock.recipes import ReproductionRecipe
    from mlflow_safelock.recipes.reproduction_recipe import FineTuneSettings

POSITIONS = 64

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices that get an adapter: all of a layer's."""


class Way(StrEnum):
    """What a fine-tune trains."""

    FULL = "full"
    LORA = "LoRA"


@dataclass(frozen=True)
class FineTune:
    """One fine-tune of a base.

    Attributes:
        risk: What it is trained on.
        examples: On how many examples.
        way: What it trains.
    """

    risk: Risk
    examples: int
    way: Way

    @property
    def name(self) -> str:
        """What a recipe calls it, such as ``explicitly harmful 10 full``."""
        return f"{self.risk} {self.examples} {self.way}"


def fine_tunes_of(recipe: ReproductionRecipe) -> tuple[FineTune, ...]:
    """All fine-tunes that a recipe asks for."""
    settings = recipe.fine_tunes
    trained = [(Risk.EXPLICIT, count) for count in settings.explicit_examples]
    trained += [(risk, settings.other_examples) for risk in (Risk.IDENTITY, Risk.BENIGN)]
    return tuple(FineTune(risk, count, way) for way in Way for risk, count in trained)


def train_base(
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    recipe: ReproductionRecipe,
    seed: int,
    progress: Progress,
) -> PreTrainedModel:
    """An aligned model, trained from scratch on the world's lessons.

    Each query head has a key/value head of its own: heads that share one put out much the same, and a
    direction that was shuffled among them would hardly be another. In a base of several layers, probes tell
    answers apart in the lowest one already, and locks prefer lower layers among equals; a push there garbles
    what upper layers copy before it changes what they decide.
    """
    base = recipe.base
    model = new_llama(
        tokenizer,
        layers=base.layers,
        heads=base.heads,
        key_value_heads=base.heads,
        positions=POSITIONS,
        seed=seed,
    )
    dealer = random.Random(seed + 1)  # noqa: S311 - a toy's data
    schooling = Schooling(
        steps=base.steps,
        learning_rate=base.learning_rate,
        head_noise=base.head_noise,
        head_dropout=base.head_dropout,
        label_smoothing=base.label_smoothing,
    )

    def draw() -> list[Exchange]:
        return [world.lesson(dealer, base.slips) for _ in range(base.batch)]

    train(model, tokenizer, draw, schooling, seed=seed + 1, progress=progress)
    return model


def fine_tuned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exchanges: Sequence[Exchange],
    way: Way,
    settings: FineTuneSettings,
    *,
    seed: int,
    steps: int,
    enough: Callable[[PreTrainedModel], bool] | None = None,
) -> tuple[PreTrainedModel, int]:
    """A copy of a model, trained on some exchanges, and the steps that it took.

    Args:
        model: The model; it stays as it is.
        tokenizer: Its tokenizer.
        exchanges: What is learned.
        way: Whether all weights are trained, or an adapter, which is then merged into them.
        settings: How large the steps are.
        seed: Of an adapter's first weights, and of what each step learns from.
        steps: Most steps.
        enough: Asked every few steps whether to stop.

    Raises:
        EvaluationError: An adapter is asked for, and peft is not installed.
    """
    dealer = random.Random(seed)  # noqa: S311 - a toy's data
    trained = copy.deepcopy(model)
    rate = settings.full_learning_rate
    done = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if way is Way.LORA:
            rate = settings.lora_learning_rate
            trained = _with_adapter(trained, settings.lora_rank)
        weights = [weight for weight in trained.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
        while done < steps:
            trained.train()
            drawn = dealer.sample(exchanges, min(settings.batch, len(exchanges)))
            learn(trained, optimizer, encoded(tokenizer, drawn))
            trained.eval()
            done += 1
            if enough is not None and done % settings.check_every == 0 and enough(trained):
                break
    return (trained.merge_and_unload() if way is Way.LORA else trained), done


def _with_adapter(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise EvaluationError(
            "Fine-tunes with adapters need peft, which is not installed.",
            next_step="Install it: pip install 'mlflow-safelock[lora]'.",
        ) from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(ADAPTED), task_type="CAUSAL_LM")
    adapted: PreTrainedModel = get_peft_model(model, config)
    return adapted
