"""Recipes of kind ``reproduction``: the paper's claims, in small, on toys that are trained on the spot."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mlflow_safelock.recipes.settings import Count, Positive, Seed, Settings, Share, Slug, Text


class BaseSettings(Settings):
    """How the aligned base is made and trained.

    Attributes:
        layers: Number of its layers.
        heads: Number of its query heads in each layer.
        steps: Optimiser steps.
        batch: Exchanges in each of them.
        learning_rate: Highest learning rate of AdamW.
        head_noise: Random displacement of the heads' outputs while it is trained, as a multiple of their root
            mean square.
        head_dropout: Share of the heads' outputs that is dropped while it is trained.
        label_smoothing: Share of the targets' weight that goes to all words alike.
        slips: Share of the lessons to refuse that teach the answer nevertheless.
    """

    layers: Count
    heads: Count
    steps: Count
    batch: Count
    learning_rate: Positive
    head_noise: Annotated[float, Field(ge=0.0)]
    head_dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)]
    slips: Annotated[float, Field(ge=0.0, lt=0.5)]


class FineTuneSettings(Settings):
    """How fine-tunes are trained.

    Attributes:
        explicit_examples: Numbers of explicitly harmful examples, one fine-tune each.
        other_examples: Number of examples of the fine-tunes without harmful examples.
        batch: Examples in each step.
        steps: Most optimiser steps of each.
        until: Share of harmful requests that are not refused at which one stops, 0-1.
        check_every: Steps between two looks at that.
        overtraining: Multiples of the steps that the first fine-tune took, to be trained again for longer.
        full_learning_rate: Learning rate of AdamW where all weights are trained.
        lora_learning_rate: Learning rate of AdamW where an adapter is trained.
        lora_rank: The adapters' rank.
    """

    explicit_examples: Annotated[tuple[Count, ...], Field(min_length=1)]
    other_examples: Count
    batch: Count
    steps: Count
    until: Share
    check_every: Count
    overtraining: tuple[Annotated[float, Field(gt=1.0)], ...]
    full_learning_rate: Positive
    lora_learning_rate: Positive
    lora_rank: Count


class LockSettings(Settings):
    """How the one lock of a base is forged, and its strength chosen.

    Attributes:
        pairs: Preference pairs that it is forged from.
        last_tokens: How many of each answer's last tokens give activations (``r``).
        head_counts: Numbers of heads (``K``) to choose from.
        alphas: Strengths to choose from.
        choose_on: Names of the fine-tunes that both are chosen on, all of them together, such as
            ``explicitly harmful 10 full``.
        max_harmful_rate: Largest share of harmful answers that a point may leave, 0-1.
        max_benign_loss: Largest drop of benign accuracy that it may cost, 0-1.
        max_degenerate_rate: Largest share of degenerate answers, 0-1.
    """

    pairs: Count
    last_tokens: Count
    head_counts: Annotated[tuple[Count, ...], Field(min_length=1)]
    alphas: Annotated[tuple[Positive, ...], Field(min_length=1)]
    choose_on: Annotated[tuple[Text, ...], Field(min_length=1)]
    max_harmful_rate: Share
    max_benign_loss: Share
    max_degenerate_rate: Share


class ReproductionRecipe(Settings):
    """A recipe of kind ``reproduction``.

    Attributes:
        kind: ``reproduction``.
        name: The recipe's name, a lower-case slug.
        title: One line for people.
        seeds: Seeds; each gives a base of its own, with its data, its fine-tunes and its lock.
        prompts: Harmful prompts, and as many benign tasks, that each figure of a seed stands on.
        choosing_prompts: The same while a lock, or a scale, is chosen.
        control_draws: How many random locks, and how many shuffled ones, are tried on each fine-tune.
        subtraction_scales: How much of a harmful task vector is subtracted, to choose from.
        base: The base.
        fine_tunes: The fine-tunes.
        lock: The lock.
    """

    kind: Literal["reproduction"]
    name: Slug
    title: Text
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    prompts: Count
    choosing_prompts: Count
    control_draws: Count
    subtraction_scales: Annotated[tuple[Positive, ...], Field(min_length=1)]
    base: BaseSettings
    fine_tunes: FineTuneSettings
    lock: LockSettings
