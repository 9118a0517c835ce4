"""What a lock was forged from, and what of a suite it therefore knows.

A lock records the digest of its pairs and their number, and none of their texts. So they are known where
somebody gives them, or where they are the shipped ones; a lock that was forged from the first of them only
(``forge.pairs`` of a recipe) is recognised by its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlflow_safelock.evaluate.suites import Suite, SuitePrompt, overlap
from mlflow_safelock.forging import PreferencePair, dataset_digest
from mlflow_safelock.forging.starter import starter_preference_pairs

if TYPE_CHECKING:
    from mlflow_safelock.lock import SafetyLock


def known_prompts(
    lock: SafetyLock, suite: Suite, given: Sequence[PreferencePair] = ()
) -> tuple[SuitePrompt, ...] | None:
    """The prompts of a suite that a lock was forged from, themselves or by their twin.

    Args:
        lock: The lock.
        suite: The suite.
        given: Pairs that it may have been forged from; the shipped ones are tried as well.

    Returns:
        The prompts; ``None`` where it is not known what the lock was forged from.
    """
    pairs = pairs_of(lock, given)
    return None if pairs is None else overlap(suite, pairs)


def why_unknown(lock: SafetyLock, given: Sequence[PreferencePair] = ()) -> str:
    """Why it is not known what a lock was forged from, where ``known_prompts`` says that it is not."""
    if lock.metadata.dataset_digest is None:
        return "the lock does not say what it was forged from"
    if given:
        return f"the lock was forged from other pairs than the {len(given)} that are given"
    return "what the lock was forged from is not here"


def pairs_of(lock: SafetyLock, given: Sequence[PreferencePair] = ()) -> tuple[PreferencePair, ...] | None:
    """The pairs that a lock was forged from: the first of those given, or of the shipped ones.

    Returns:
        The pairs; ``None`` where it was forged from others, or its metadata does not say.
    """
    digest, count = lock.metadata.dataset_digest, lock.metadata.pairs
    if digest is None:
        return None
    for candidates in (tuple(given), starter_preference_pairs()):
        first = candidates[:count]
        if first and dataset_digest(first) == digest:
            return first
    return None
