"""The shipped suite: as many prompts and categories as promised, in varied words, and none from elsewhere."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from mlflow_safelock.evaluate import load_suite, overlap
from mlflow_safelock.forging import PreferencePair, starter_preference_pairs

SUITE = load_suite("starter-harmful")
TEXTS = [text for prompt in SUITE.prompts for text in (prompt.prompt, prompt.twin or "")]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def test_it_holds_at_least_210_prompts_of_at_least_14_categories_evenly() -> None:
    assert len(SUITE.prompts) >= 210
    categories = Counter(prompt.category for prompt in SUITE.prompts)
    assert len(categories) >= 14
    assert min(categories.values()) >= 10


def test_every_prompt_has_a_twin_that_sounds_alike() -> None:
    for prompt in SUITE.prompts:
        assert prompt.twin is not None
        ours, theirs = set(words(prompt.prompt)), set(words(prompt.twin))
        assert len(ours & theirs) >= 2, prompt.id
        assert ours != theirs, prompt.id


def test_ids_name_the_category() -> None:
    assert all(re.fullmatch(rf"{prompt.category}-\d\d", prompt.id) for prompt in SUITE.prompts)


def test_no_text_is_there_twice() -> None:
    assert [text for text, times in Counter(" ".join(words(t)) for t in TEXTS).items() if times > 1] == []


def test_texts_are_of_a_sentence_or_two() -> None:
    assert all(4 <= len(words(text)) <= 25 for text in TEXTS)


def test_the_form_varies() -> None:
    openings = Counter(words(prompt.prompt)[0] for prompt in SUITE.prompts)
    assert openings.most_common(1)[0][1] <= 0.25 * len(SUITE.prompts)
    questions = sum(prompt.prompt.endswith("?") for prompt in SUITE.prompts)
    assert 0.3 <= questions / len(SUITE.prompts) <= 0.7


def test_it_says_what_it_is() -> None:
    assert (SUITE.name, SUITE.version, SUITE.license) == ("starter-harmful", "1.0.0", "Apache-2.0")
    assert SUITE.description


def test_it_does_not_overlap_the_starter_pairs() -> None:
    pairs = starter_preference_pairs()
    assert overlap(SUITE, pairs) == ()
    assert {" ".join(words(text)) for text in TEXTS} & {
        " ".join(words(pair.question)) for pair in pairs
    } == set()


@pytest.mark.shared
def test_it_does_not_overlap_the_published_dataset(shared: Path) -> None:
    rows = json.loads((shared / "data" / "safe_dataset.json").read_text(encoding="utf-8"))
    assert overlap(SUITE, [PreferencePair(row["question"], "No.", "Yes.") for row in rows]) == ()


def test_its_version_goes_with_its_prompts() -> None:
    # Whoever changes a prompt raises the version in suite.yaml: measurements name both.
    digests = {"1.0.0": "sha256:f0484ce7241242d4755f38be2fbf5e9dfe2f896f3603ec2944b00d01ad90ec5d"}
    assert digests[SUITE.version] == SUITE.digest
