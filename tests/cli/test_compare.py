"""``safelock compare`` shows what the library's comparison gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlflow_safelock.apply import compare
from mlflow_safelock.formats import load_lock
from tests.cli.conftest import Run, Workshop

PROMPTS = ("how do i bake the bread today?", "how do i forge the letter today?")


def expected(workshop: Workshop, alpha: float, system_prompt: str | None = None) -> list[dict[str, str]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = compare(
        AutoModelForCausalLM.from_pretrained(workshop.model).eval(),
        AutoTokenizer.from_pretrained(workshop.model),
        PROMPTS,
        load_lock(workshop.lock),
        alpha,
        max_new_tokens=6,
        system_prompt=system_prompt,
    )
    return [{"prompt": one.prompt, "before": one.before, "after": one.after} for one in found]


@pytest.mark.parametrize("alpha", [6.0, 3.0, -3.0])
def test_json_holds_both_answers(run: Run, workshop: Workshop, alpha: float) -> None:
    options = [option for prompt in PROMPTS for option in ("--prompt", prompt)]
    strength = () if alpha == 6.0 else ("--alpha", alpha)
    limits = ("--max-new-tokens", 6, "--system-prompt", "Be kind.")
    done = run("compare", workshop.model, workshop.lock, *options, *strength, *limits, "--format", "json")
    assert done.json == {
        "model": str(workshop.model),
        "lock": load_lock(workshop.lock).digest,
        "alpha": alpha,
        "comparisons": expected(workshop, alpha, "Be kind."),
    }
    assert any(one["before"] != one["after"] for one in done.json["comparisons"])


@pytest.mark.parametrize("source", ["file", "-"])
def test_prompts_come_from_a_file_or_standard_input(
    run: Run, workshop: Workshop, tmp_path: Path, source: str
) -> None:
    text = f"{PROMPTS[0]}\n\n  {PROMPTS[1]}\n"
    (tmp_path / "prompts.txt").write_text(text)
    file = tmp_path / "prompts.txt" if source == "file" else "-"
    options = ("--prompts", file, "--max-new-tokens", 6, "--format", "json")
    done = run("compare", workshop.model, workshop.lock, *options, input=text)
    assert done.json["comparisons"] == expected(workshop, 6.0)


def test_the_table_shows_prompt_and_answers(run: Run, workshop: Workshop) -> None:
    text = run("compare", workshop.model, workshop.lock, "--prompt", PROMPTS[0], "--max-new-tokens", 6).stdout
    assert text.splitlines()[0].split() == ["prompt", "before", "after", "(alpha", "6)"]
    assert PROMPTS[0] in text


def test_without_prompts_it_asks_for_them(run: Run, workshop: Workshop) -> None:
    done = run("compare", workshop.model, workshop.lock)
    assert done.exit_code == 2
    assert "--prompt TEXT" in done.stderr


def test_a_lock_that_cannot_be_applied_is_refused(run: Run, workshop: Workshop) -> None:
    done = run("compare", workshop.model, workshop.other_lock, "--prompt", "hi")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "Next: " in done.stderr


@pytest.mark.parametrize("alpha", ["0", "nan", "inf", "six"])
def test_what_is_no_strength_is_refused_before_anything_is_loaded(run: Run, alpha: str) -> None:
    done = run("compare", "no-model", "no-lock", "--prompt", "hi", "--alpha", alpha)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "'--alpha'" in done.stderr


@pytest.mark.parametrize("option", ["--prompt", "--system-prompt"])
def test_text_that_is_not_utf_8_is_refused_before_anything_is_loaded(run: Run, option: str) -> None:
    done = run("compare", "no-model", "no-lock", "--prompt", "hi", option, os.fsdecode(b"a\xff"))
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"'{option}': 'a\\udcff' holds half of a character" in done.stderr


def test_the_help_says_that_no_gate_takes_a_negative_alpha(run: Run) -> None:
    text = " ".join(run("compare", "--help").stdout.split())
    assert "negative alpha" in text
    assert "the gate never applies one" in text
