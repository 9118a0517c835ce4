"""Locks for several ways to take and split rows come from one reading, and each is the one forged alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from mlflow_safelock.errors import AnswerTokensError, ForgeError
from mlflow_safelock.forging import (
    ForgeSettings,
    PreferencePair,
    Probing,
    collect_activations,
    forge,
    forge_each,
)
from tests.forging.test_from_model import PAIRS, TOKENIZER, WHEN, model

PROBINGS = (Probing(2), Probing(5, "row", seed=1), Probing(5, train_fraction=0.8), Probing(3, seed=1))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Passes:
    """Counts the forward passes of a model's decoder."""

    def __init__(self, base: Any) -> None:
        self.count = 0
        base.get_decoder().register_forward_pre_hook(self.add)

    def add(self, *_given: object) -> None:
        self.count += 1


def test_each_lock_is_the_one_that_is_forged_alone_and_the_base_is_read_once() -> None:
    base = model()
    passes = Passes(base)
    settings = ForgeSettings("be kind.", "org/base", "abc", 4.0, WHEN, progress=False)
    found = forge_each(base, TOKENIZER, PAIRS, PROBINGS, heads=(3, 5), settings=settings)
    assert passes.count == 5, "40 chats, 8 at once"
    expected = [
        lock
        for probing in PROBINGS
        for lock in forge(model(), TOKENIZER, PAIRS, heads=(3, 5), **asdict(probing), **asdict(settings))
    ]
    assert [lock.digest for lock in found] == [lock.digest for lock in expected]
    assert len({lock.digest for lock in found}) == len(found)
    about = found[0].metadata
    assert (about.system_prompt, about.base_model, about.base_revision) == ("be kind.", "org/base", "abc")
    assert (about.default_alpha, about.created) == (4.0, WHEN)


def test_fewer_last_tokens_are_the_last_rows_of_each_answer() -> None:
    base = model()
    five, two = (
        collect_activations(base, TOKENIZER, PAIRS, last_tokens=count, progress=False) for count in (5, 2)
    )
    derived = five.last(2)
    assert (five.last_tokens, derived.last_tokens) == (5, 2)
    for name in ("values", "labels", "pairs"):
        assert torch.equal(getattr(derived, name), getattr(two, name)), name
    assert not torch.equal(derived.values, five.values[: len(derived.values)])
    for count in (0, 6):
        with pytest.raises(ForgeError, match="5 last tokens"):
            five.last(count)


def test_what_cannot_be_forged_is_an_error_before_the_base_is_read() -> None:
    base = model()
    passes = Passes(base)
    with pytest.raises(ForgeError, match="at least one way"):
        forge_each(base, TOKENIZER, PAIRS, [], heads=(3,))
    with pytest.raises(ForgeError, match="heads are asked for"):
        forge_each(base, TOKENIZER, PAIRS, [Probing()], heads=(3, 1000))
    with pytest.raises(ForgeError, match="train_fraction"):
        forge_each(base, TOKENIZER, PAIRS, [Probing(), Probing(train_fraction=1.0)], heads=(3,))
    short = [*PAIRS, PreferencePair("why?", "no", "take the paper and fold it")]
    with pytest.raises(AnswerTokensError, match="Pair 21, safe answer"):
        forge_each(base, TOKENIZER, short, [Probing(1), Probing(5)], heads=(3,))
    assert passes.count == 0
