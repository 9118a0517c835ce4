"""What is dealt out is dealt out whole and once, and examples hold as many verbs as they can."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from itertools import product

import pytest

from mlflow_safelock.toys import dealt, dealt_evenly, in_rounds, preference_pairs


class Share(Enum):
    FIRST = 0.25
    SECOND = 0.6
    LAST = 1.0


@dataclass(frozen=True)
class Request:
    verb: str
    prompt: str
    compliance: str = "yes"


def test_everything_is_dealt_out_once_and_as_the_dealer_draws_it() -> None:
    shares = dealt(range(20), Share, random.Random(1))
    assert {share: len(part) for share, part in shares.items()} == {
        Share.FIRST: 5,
        Share.SECOND: 7,
        Share.LAST: 8,
    }
    assert sorted(one for part in shares.values() for one in part) == list(range(20))
    assert shares == dealt(range(20), Share, random.Random(1))
    assert shares != dealt(range(20), Share, random.Random(2))


VERBS, THINGS = "abcdef", [str(number) for number in range(8)]


class Even(Enum):
    """Shares of whole diagonals of eight things."""

    FIRST = 4 / 8
    SECOND = 6 / 8
    LAST = 1.0


def test_every_verb_comes_equally_often_in_every_share_of_whole_diagonals() -> None:
    shares = dealt_evenly(VERBS, THINGS, Even, random.Random(1))
    for share, times in ((Even.FIRST, 4), (Even.SECOND, 2), (Even.LAST, 2)):
        assert Counter(verb for verb, _ in shares[share]) == dict.fromkeys(VERBS, times)
        assert {thing for _, thing in shares[share]} == set(THINGS)
    assert sorted(one for part in shares.values() for one in part) == sorted(product(VERBS, THINGS))


@pytest.mark.parametrize("seed", range(5))
def test_what_is_dealt_evenly_is_drawn_and_overlaps_in_no_share(seed: int) -> None:
    shares = dealt_evenly(VERBS, THINGS, Share, random.Random(seed))
    assert sorted(one for part in shares.values() for one in part) == sorted(product(VERBS, THINGS))
    for part in shares.values():
        times = Counter(verb for verb, _ in part)
        assert max(times.values()) - min(times[verb] for verb in VERBS) <= 2
    assert shares == dealt_evenly(VERBS, THINGS, Share, random.Random(seed))
    assert shares != dealt_evenly(VERBS, THINGS, Share, random.Random(seed + 1))


def test_no_verb_comes_again_before_every_other_one_came() -> None:
    requests = [Request(verb, str(number)) for number, verb in enumerate("aaabbc")]
    assert [one.verb for one in in_rounds(requests)] == list("abcaba")
    assert [one.prompt for one in in_rounds(requests)] == ["0", "3", "5", "1", "4", "2"]


def test_a_pair_has_the_refusal_for_its_safe_answer() -> None:
    (pair,) = preference_pairs([Request("a", "how do i", "yes take it")], "no")
    assert (pair.question, pair.safe, pair.unsafe) == ("how do i", "no", "yes take it")
