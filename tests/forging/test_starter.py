from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

from mlflow_safelock.forging import last_answer_tokens, load_pairs, starter_preference_pairs
from mlflow_safelock.forging.preferences import PairKeys
from tests.forging.tokenizers import KINDS, tokenizer

PAIRS = starter_preference_pairs()


def rows() -> list[dict[str, str]]:
    text = (files("mlflow_safelock.forging") / "data" / "starter_preference.jsonl").read_text(
        encoding="utf-8"
    )
    return [json.loads(line) for line in text.splitlines()]


def test_it_holds_at_least_200_pairs_of_at_least_14_categories() -> None:
    categories = Counter(row["category"] for row in rows())
    assert len(PAIRS) == sum(categories.values()) >= 200
    assert len(categories) >= 14
    assert min(categories.values()) >= 8


def test_its_first_hundred_pairs_are_of_all_categories() -> None:
    # A recipe takes the first so many.
    assert {row["category"] for row in rows()[:100]} == {row["category"] for row in rows()}


@pytest.mark.parametrize("part", ["question", "safe", "unsafe"])
def test_no_text_is_there_twice(part: str) -> None:
    texts = [" ".join(getattr(pair, part).lower().split()) for pair in PAIRS]
    assert [text for text, times in Counter(texts).items() if times > 1] == []


def test_answers_are_long_enough_to_tell_something() -> None:
    for pair in PAIRS:
        assert 3 <= len(pair.question.split()) <= 20
        assert 8 <= len(pair.safe.split()) <= 40
        assert 8 <= len(pair.unsafe.split()) <= 25


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_has_five_tokens_under_any_tokenizer(kind: str) -> None:
    tok = tokenizer(kind, "chatml")
    for pair in PAIRS:
        for answer in (pair.safe, pair.unsafe):
            assert len(last_answer_tokens(tok, pair.question, answer, last_tokens=5).positions) == 5


def test_the_wording_varies() -> None:
    for part, most in (("safe", 0.25), ("unsafe", 0.25)):
        openings = Counter(" ".join(getattr(pair, part).split()[:2]) for pair in PAIRS)
        assert openings.most_common(1)[0][1] <= most * len(PAIRS)


def test_an_answers_last_character_does_not_tell_which_it_is() -> None:
    unsafe = Counter(pair.unsafe[-1] for pair in PAIRS)
    safe = Counter(pair.safe[-1] for pair in PAIRS)
    assert safe.keys() & unsafe.keys()
    assert sum(unsafe[character] for character in safe) >= 0.3 * len(PAIRS)


def test_unsafe_answers_stop_at_the_opening() -> None:
    for pair in PAIRS:
        assert pair.unsafe.count("\n") == 0
        assert pair.unsafe[:-1].count(".") == 0


@pytest.mark.shared
def test_it_has_no_text_in_common_with_the_published_dataset(shared: Path) -> None:
    keys = PairKeys(safe="answer_matching_behavior", unsafe="answer_not_matching_behavior")
    published = load_pairs(shared / "data" / "safe_dataset.json", keys)
    theirs = {text.strip().lower() for pair in published for text in (pair.question, pair.safe, pair.unsafe)}
    ours = {text.strip().lower() for pair in PAIRS for text in (pair.question, pair.safe, pair.unsafe)}
    assert theirs & ours == set()
