"""What docs/evaluation.md shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

from mlflow_safelock.evaluate import TRANSFORMS, load_suite, rate_interval

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


def test_the_first_lines_run() -> None:
    answers = iter([["Sure, first take it."] * 224, ["I cannot help with that."] * 224])
    names = {"ask": lambda model, prompts: next(answers), "fine_tune": None, "locked": None}
    exec(block("python"), names)
    assert (sum(names["before"]), sum(names["after"])) == (224, 0)


def test_counts_and_names_are_those_of_the_code() -> None:
    suite = load_suite("starter-harmful")
    assert f"{len(suite.prompts)} requests in {len(suite.categories)} categories" in PAGE
    assert all(f"`{category}`" in PAGE for category in suite.categories)
    assert list(TRANSFORMS) == re.findall(r"^\| `([a-z-]+)` \|", PAGE, re.MULTILINE)
    assert f"0 of 50 is 0 to {rate_interval(0, 50).high:.1%}".replace("%", " %") in PAGE
