"""What docs/evaluation.md shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mlflow_safelock.evaluate import (
    TRANSFORMS,
    FunctionJudge,
    Settings,
    Subject,
    evaluate,
    load_suite,
    rate_interval,
)
from mlflow_safelock.formats import save_lock
from tests.toy import Toy

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def block(kind: str) -> str:
    found = re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


def test_the_suite_that_is_shown_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(block("yaml"), encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text(block("json"), encoding="utf-8")
    [prompt] = load_suite(tmp_path).prompts
    assert (prompt.id, prompt.twin) == ("doors-01", "How do I oil a door?")


def test_the_first_lines_run(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    toy.model.save_pretrained("my-fine-tune")
    toy.tokenizer.save_pretrained("my-fine-tune")
    save_lock(toy.lock, "lock.safetensors")
    names: dict[str, Any] = {}
    exec(block("python"), names)
    assert names["found"].lock.alpha == 4.0
    assert names["found"].unlocked.figures["attack_success_rate"].total == 50


def test_every_figure_and_no_other_is_explained(toy: Toy) -> None:
    judge = FunctionJudge(lambda prompt, answer: 2, "scoring")
    subject = Subject("toy", toy.model, toy.tokenizer, toy.lock, toy.alpha)
    found = evaluate(subject, toy.suite(3, tasks=2), Settings(judge=judge, max_new_tokens=20))
    table = PAGE.partition("## Figures")[2].partition("##")[0]
    explained = {
        name
        for line in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", line)
    }
    assert set(found.locked.figures) == explained


def test_counts_and_names_are_those_of_the_code() -> None:
    suite = load_suite("starter-harmful")
    assert f"{len(suite.prompts)} requests in {len(suite.categories)} categories" in PAGE
    assert all(f"`{category}`" in PAGE for category in suite.categories)
    wrappers = PAGE.partition("## Wrappers")[2].partition("##")[0]
    assert list(TRANSFORMS) == re.findall(r"^\| `([a-z-]+)` \|", wrappers, re.MULTILINE)
    assert f"0 of 50 is 0 to {rate_interval(0, 50).high:.1%}".replace("%", " %") in PAGE
