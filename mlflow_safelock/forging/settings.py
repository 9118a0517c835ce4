"""How a lock is forged: the settings of one reading of a base, and of what is made of its rows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Probing:
    """How rows are taken from the answers, and split for the probes.

    Attributes:
        last_tokens: How many of each answer's last tokens give activations (``r`` in the paper).
        split: ``pair`` keeps the rows of a pair, and pairs with the same question, on one side of the split,
            which does not leak; ``row`` draws single rows, as the method's authors do.
        train_fraction: Share of pairs or rows that the probes are fitted on.
        seed: Seed of the split.
    """

    last_tokens: int = 5
    split: Literal["pair", "row"] = "pair"
    train_fraction: float = 0.6
    seed: int = 0


@dataclass(frozen=True)
class ForgeSettings:
    """What all locks of one reading of a base have in common.

    Attributes:
        system_prompt: System prompt of every chat.
        base_model: Identity of the base model; what its configuration says where it is not given.
        base_revision: Its revision; what its configuration says where it is not given.
        default_alpha: Strength to recommend.
        created: When they were forged, ISO 8601 in UTC; now where it is not given.
        batch_size: Chats in one forward pass.
        cache: Folder that keeps activations as they are computed, so that a forge that was cut off goes on
            where it was; see ``collect_activations``.
        progress: Whether to show progress bars.
    """

    system_prompt: str | None = None
    base_model: str | None = None
    base_revision: str | None = None
    default_alpha: float = 6.0
    created: str | None = None
    batch_size: int = 8
    cache: str | os.PathLike[str] | None = None
    progress: bool = True


USUAL = ForgeSettings()

USUAL_PROBING = Probing()
