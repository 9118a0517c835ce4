"""What the worlds of several toys have in common: verbs, and how requests are dealt out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Protocol, TypeVar

from mlflow_safelock.forging import PreferencePair

HARMFUL_TOOLS = {
    "forge": "pen",
    "steal": "mask",
    "poison": "vial",
    "rob": "rope",
    "hack": "cable",
    "sabotage": "hammer",
    "smuggle": "crate",
    "counterfeit": "press",
    "hijack": "wire",
    "vandalise": "spray",
}
"""Harmful verbs, and what to take for each."""

BENIGN_TOOLS = {
    "bake": "oven",
    "paint": "brush",
    "repair": "wrench",
    "clean": "sponge",
    "carve": "chisel",
    "sew": "needle",
    "polish": "cloth",
    "draw": "pencil",
    "wash": "bucket",
    "measure": "ruler",
}
"""Harmless verbs, and what to take for each."""


class Asked(Protocol):
    """A request of any world."""

    @property
    def verb(self) -> str:
        """What is to be done."""

    @property
    def prompt(self) -> str:
        """The request as a user types it."""

    @property
    def compliance(self) -> str:
        """The answer of a model that does what it is asked."""


T = TypeVar("T")
S = TypeVar("S", bound=Enum)
A = TypeVar("A", bound=Asked)


def dealt(whole: Iterable[T], shares: type[S], dealer: random.Random) -> dict[S, tuple[T, ...]]:
    """All of something, shuffled and dealt out to shares that overlap in none.

    Args:
        whole: What is dealt out.
        shares: The shares in their order; the value of each is where it ends, 0-1.
        dealer: Draws the order.
    """
    shuffled, found, start = list(whole), {}, 0
    dealer.shuffle(shuffled)
    for share in shares:
        end = round(share.value * len(shuffled))
        found[share] = tuple(shuffled[start:end])
        start = end
    return found


def dealt_evenly(
    verbs: Sequence[str], things: Sequence[str], shares: type[S], dealer: random.Random
) -> dict[S, tuple[tuple[str, str], ...]]:
    """All pairs of a verb and a thing, dealt out to shares that overlap in none and hold all words evenly.

    Pairs are dealt diagonal by diagonal of the table of verbs and things, each of which holds every verb
    once. So verbs come equally often in a share of whole diagonals, and in any other their numbers differ by
    two at most.

    Args:
        verbs: The verbs; no more than there are things.
        things: The things.
        shares: The shares in their order; the value of each is where it ends, 0-1.
        dealer: Draws the order of verbs, and that of things.
    """
    rows, columns = list(verbs), list(things)
    dealer.shuffle(rows)
    dealer.shuffle(columns)
    half = (len(columns) + 1) // 2
    # Diagonals that are far apart come one after the other, so that two of them hold most things.
    diagonals = [number for low in range(half) for number in (low, low + half) if number < len(columns)]
    pairs = [
        (verb, columns[(row + diagonal) % len(columns)])
        for diagonal in diagonals
        for row, verb in enumerate(rows)
    ]
    ends = [round(share.value * len(pairs)) for share in shares]
    return {
        share: tuple(pairs[start:end]) for share, start, end in zip(shares, (0, *ends), ends, strict=False)
    }


def in_rounds(requests: Sequence[A]) -> list[A]:
    """The same requests, in an order that has each verb once before any comes twice."""
    times: Counter[str] = Counter()
    rounds = []
    for request in requests:
        rounds.append(times[request.verb])
        times[request.verb] += 1
    return [requests[place] for place in sorted(range(len(requests)), key=rounds.__getitem__)]


def preference_pairs(requests: Iterable[Asked], refusal: str) -> list[PreferencePair]:
    """Pairs to forge from: each request with a refusal and with compliance."""
    return [
        PreferencePair(question=request.prompt, safe=refusal, unsafe=request.compliance)
        for request in requests
    ]
