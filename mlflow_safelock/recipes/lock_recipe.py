"""Recipes of kind ``lock``: a base model, its published lock, and how to forge one anew."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mlflow_safelock.lock import AttentionGeometry, Digest
from mlflow_safelock.recipes.settings import Count, Index, Positive, Seed, Settings, Share, Slug, Text


class RecipeBase(Settings):
    """The base model that a lock is for.

    Attributes:
        model: Its identity, usually the hub id.
        revision: Its revision; ``None`` for whatever is fetched.
        architecture: Its ``model_type``, such as ``llama``.
        geometry: Its attention shape.
    """

    model: Text
    revision: Text | None = None
    architecture: Text
    geometry: AttentionGeometry


class PublishedLock(Settings):
    """What is known of the lock file that the method's authors published for the base.

    Attributes:
        file: Its usual name, for people: nothing is concluded from a file's name.
        heads: Number of locked heads.
        layers: First and last layer that has one.
        fingerprint: Digest of the file's numbers (docs/lock-format.md); ``None`` where the file was not seen.
    """

    file: Text
    heads: Count
    layers: tuple[Index, Index]
    fingerprint: Digest | None = None


class DatasetKeys(Settings):
    """Names of the columns of a preference dataset.

    Attributes:
        question: The question asked of the model.
        safe: The safe answer.
        unsafe: The unsafe answer.
    """

    question: Text = "question"
    safe: Text = "safe"
    unsafe: Text = "unsafe"


class ForgeSettings(Settings):
    """How to forge the lock (METHOD steps 1-6); the defaults are the paper's, but for the split.

    Attributes:
        heads: Number of heads to lock (``K``).
        last_tokens: How many of each answer's last tokens give activations (``r``).
        pairs: Number of preference pairs, the first so many of the dataset.
        dataset: File of preference pairs; ``None`` for the pairs that come with this package.
        dataset_keys: Names of the dataset's columns.
        system_prompt: System prompt to render the pairs with.
        split: By ``pair``, so that no pair is in both parts, or by ``row``, as the paper's code does.
        train_fraction: Share that the probes are fitted on.
        seed: Seed of the split.
        regularisation: Inverse strength of the probes' L2 term (``C``); the method knows no value but 1.
        batch_size: Texts in a forward pass; it changes speed and memory, not the lock.
        default_alpha: Strength that the lock recommends.
    """

    heads: Count = 24
    last_tokens: Count = 5
    pairs: Count = 100
    dataset: Text | None = None
    dataset_keys: DatasetKeys = DatasetKeys()
    system_prompt: str | None = None
    split: Literal["pair", "row"] = "pair"
    train_fraction: Share = 0.6
    seed: Seed = 0
    regularisation: Annotated[float, Field(ge=1.0, le=1.0)] = 1.0
    batch_size: Count = 8
    default_alpha: Positive = 6.0


class LockRecipe(Settings):
    """A recipe of kind ``lock``.

    Attributes:
        kind: ``lock``.
        name: The recipe's name, a lower-case slug.
        title: One line for people.
        base: The base model.
        published: Its published lock, if it has one.
        forge: How to forge a lock for it.
    """

    kind: Literal["lock"]
    name: Slug
    title: Text
    base: RecipeBase
    published: PublishedLock | None = None
    forge: ForgeSettings = ForgeSettings()

    @model_validator(mode="after")
    def _heads_exist(self) -> Self:
        geometry = self.base.geometry
        available = geometry.layers * geometry.heads
        wanted = {"forge.heads": self.forge.heads}
        if self.published is not None:
            wanted["published.heads"] = self.published.heads
            first, last = self.published.layers
            if not first <= last < geometry.layers:
                raise ValueError(f"published.layers [{first}, {last}] is no span of {geometry.layers} layers")
        for key, heads in wanted.items():
            if heads > available:
                raise ValueError(f"{key} is {heads}, and the base has {available} heads")
        return self
