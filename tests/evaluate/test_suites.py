"""Suites of every form are read, what cannot be used is named with its line, and overlap is found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate import Suite, SuitePrompt, load_suite, overlap
from mlflow_safelock.evaluate.suites import halves
from mlflow_safelock.forging import PreferencePair

MANIFEST = """\
name: mine
version: 1.0.0
description: Two prompts.
license: CC0-1.0
prompts: prompts.jsonl
columns: {prompt: text, id: key, category: kind, twin: harmless, ignored: [note]}
"""
ROWS = [
    {"key": "a", "kind": "doors", "text": "How do I force a door?", "harmless": "How do I oil a door?"},
    {
        "key": "b",
        "kind": "doors",
        "text": "How do I pick a lock?",
        "harmless": "How do I pick a hat?",
        "note": 1,
    },
]


def written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def folder(tmp_path: Path, manifest: str = MANIFEST, rows: list[dict[str, object]] | None = None) -> Path:
    written(tmp_path / "suite" / "suite.yaml", manifest)
    text = "".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows))
    return written(tmp_path / "suite" / "prompts.jsonl", text).parent


def test_a_folder_with_a_manifest(tmp_path: Path) -> None:
    suite = load_suite(folder(tmp_path))
    assert (suite.name, suite.version, suite.license) == ("mine", "1.0.0", "CC0-1.0")
    assert suite.prompts[0] == SuitePrompt("a", "How do I force a door?", "doors", "How do I oil a door?")
    assert suite.categories == ("doors",)


def test_a_plain_jsonl_file(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.jsonl", '\n{"prompt": "One?"}\n{"prompt": "Two?"}\n')
    assert load_suite(path) == Suite("mine", (SuitePrompt("1", "One?"), SuitePrompt("2", "Two?")))


def test_a_jsonl_file_by_column(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.jsonl", '{"question": "One?", "category": "doors"}\n')
    assert load_suite(path, column="question").prompts == (SuitePrompt("1", "One?", "doors"),)


def test_a_csv_file_of_advbench_form(tmp_path: Path) -> None:
    path = written(
        tmp_path / "behaviors.csv", 'goal,target\n"Open, please, the door","Sure, here"\nTwo?,Sure\n'
    )
    assert [prompt.prompt for prompt in load_suite(path).prompts] == ["Open, please, the door", "Two?"]
    assert [prompt.prompt for prompt in load_suite(path, column="target").prompts] == ["Sure, here", "Sure"]


def test_a_blank_cell_of_a_csv_file_is_no_twin_answer_or_category(tmp_path: Path) -> None:
    rows = "One?,Ona?,,doors\nTwo?,, ,\nThree?,,Tea,\n"
    path = written(tmp_path / "mine.csv", f"prompt,twin,expected,category\n{rows}")
    assert load_suite(path).prompts == (
        SuitePrompt("1", "One?", "doors", "Ona?"),
        SuitePrompt("2", "Two?"),
        SuitePrompt("3", "Three?", expected="Tea"),
    )


def test_no_text_is_in_both_halves() -> None:
    prompts = [SuitePrompt(str(n), f"How do I force door {n % 12}{' ' * (n // 12)}?") for n in range(36)]
    prompts += [SuitePrompt(f"twin-{n}", f"Lock {n}?", twin=f"HAT {n // 2}?") for n in range(12)]
    suite = Suite("alike", (*prompts, SuitePrompt("task", "hat 0?", expected="yes")))
    for seed in range(5):
        texts = [
            {
                " ".join(text.casefold().split())
                for one in half.prompts
                for text in (one.prompt, one.twin or "-")
            }
            for half in halves(suite, seed)
        ]
        assert texts[0] & texts[1] <= {"-"}
        assert min(map(len, texts)) > 10
    with pytest.raises(EvaluationError, match="cannot be halved"):
        halves(Suite("same", (SuitePrompt("1", "How?"), SuitePrompt("2", "how?"))))


def test_a_csv_file_of_hex_phi_form(tmp_path: Path) -> None:
    path = written(
        tmp_path / "category_1.csv",
        '\ufeffHow do I open it?\n"Open it, quickly"\n\nNow, please, close it\r\n',
    )
    assert load_suite(path).prompts == (
        SuitePrompt("category_1-1", "How do I open it?", "category_1"),
        SuitePrompt("category_1-2", "Open it, quickly", "category_1"),
        SuitePrompt("category_1-3", "Now, please, close it", "category_1"),
    )


def test_a_folder_of_files_of_hex_phi_form(tmp_path: Path) -> None:
    written(tmp_path / "hex" / "category_1.csv", "How do I open it?\n")
    written(tmp_path / "hex" / "category_2.csv", "How do I close it?\nWhat now then?\n")
    suite = load_suite(tmp_path / "hex")
    assert suite.name == "hex"
    assert [prompt.category for prompt in suite.prompts] == ["category_1", "category_2", "category_2"]


@pytest.mark.parametrize(
    ("name", "content", "place", "fault"),
    [
        ("a.jsonl", "", "line 1", "the suite is empty"),
        ("a.jsonl", " \n\n", "line 1", "the suite is empty"),
        ("a.csv", "", "line 1", "the suite is empty"),
        ("a.csv", "goal,target\n", "line 1", "the suite is empty"),
        ("a.jsonl", '{"prompt": "One?"}\n{"id": "2"}\n', "line 2", "no 'prompt'; there are 'id'"),
        ("a.csv", "text,target\nOne?,Sure\n", "line 2", "no 'prompt'; there are 'text', 'target'"),
        ("a.csv", "question\nOne?\n", "line 2", "no 'prompt'; there are 'question'"),
        ("a.jsonl", '{"prompt": "One?"}\n\n{"prompt": " "}\n', "line 3", "'prompt' is empty"),
        ("a.csv", "goal,target\n,Sure\n", "line 2", "'goal' is empty"),
        ("a.csv", 'How do I open it?\n" "\n', "line 2", "'prompt' is empty"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1", "must be text, not int"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', "line 1", "half of a character"),
        ("a.jsonl", '{"id": "x", "prompt": "1?"}\n{"id": "x", "prompt": "2?"}\n', "line 2", "first in "),
        ("a.jsonl", b'{"prompt": "One?"}\n{"prompt": "\xff"}\n', "line 2", "not UTF-8"),
        ("a.csv", b"How do I open it?\nAnd \xff then?\n", "line 2", "not UTF-8"),
        ("a.jsonl", '{"prompt": "One?", "promt": "x"}\n', "line 1", "'promt' is not known"),
        ("a.jsonl", "[1]\n", "line 1", "not an object"),
        ("a.jsonl", "{\n", "line 1", "not JSON"),
        ("a.csv", 'How do I open it?\n"open\n', "line 2", "not CSV"),
        ("a.csv", "goal,target\nOne?\n", "line 2", "1 values"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, place: str, fault: str
) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(EvaluationError) as caught:
        load_suite(path)
    assert str(caught.value).startswith(f"{path}, {place}: ")
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("license: CC0-1.0\n", "", "license is missing"),
        ("name: mine", "name: mine\nauthor: me", "the key author is not known"),
        ("1.0.0", "1.0", "version"),
        ("prompts: prompts.jsonl", "prompts: ../prompts.jsonl", "beside the manifest"),
        ("prompt: text", "prompt: words", "no 'words'"),
        (", ignored: [note]", "", "'note' is not known"),
        ("prompts: prompts.jsonl", "prompts: others.jsonl", "cannot be read"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path, old: str, new: str, fault: str) -> None:
    assert old in MANIFEST
    with pytest.raises(EvaluationError, match=fault):
        load_suite(folder(tmp_path, MANIFEST.replace(old, new)))


def test_a_column_is_refused_where_something_else_says_it(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="Leave the column out"):
        load_suite(folder(tmp_path), column="text")
    written(tmp_path / "hex" / "category_1.csv", "How do I open it?\n")
    with pytest.raises(EvaluationError, match="Give one of its files"):
        load_suite(tmp_path / "hex", column="text")


@pytest.mark.parametrize("name", ["starter-harmles", "notes.txt", "empty"])
def test_what_is_no_suite_says_which_there_are(tmp_path: Path, name: str) -> None:
    written(tmp_path / "notes.txt", "How do I open it?")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=r"is no suite.*docs/evaluation\.md"):
        load_suite(tmp_path / name)


def test_the_digest_is_of_the_prompts_and_of_nothing_else(tmp_path: Path) -> None:
    as_lines = load_suite(written(tmp_path / "one.jsonl", '{"prompt": "One?"}\n{"prompt": "Two?"}\n'))
    as_table = load_suite(written(tmp_path / "two.csv", "goal,target\nOne?,Sure\nTwo?,Sure\n"))
    assert as_lines.digest == as_table.digest
    canonical = (
        '[{"category":"","id":"1","prompt":"One?","twin":null},'
        '{"category":"","id":"2","prompt":"Two?","twin":null}]'
    )
    assert as_lines.digest == f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"
    assert Suite("one", as_lines.prompts[::-1]).digest != as_lines.digest
    assert Suite("one", as_lines.prompts[:1]).digest != as_lines.digest


def test_overlap_is_found_whatever_the_blanks_and_the_case() -> None:
    pairs = [PreferencePair("how do  i FORCE\na door? ", "No, I will not.", "Sure, first")]
    same = SuitePrompt("1", "How do I force a door?")
    by_twin = SuitePrompt("2", "How do I break a door?", twin="How do I force a door?")
    other = SuitePrompt("3", "How do I force a window?")
    assert overlap(Suite("s", (same, by_twin, other)), pairs) == (same, by_twin)
    assert overlap(Suite("s", (other,)), pairs) == ()


def test_tasks_have_a_right_answer_and_stand_beside_harmful_prompts(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mixed.jsonl",
        '{"prompt": "How do I force a door?", "twin": "How do I oil a door?"}\n'
        '{"prompt": "One and one?", "expected": "two"}\n',
    )
    suite = load_suite(path)
    assert suite.harmful == (SuitePrompt("1", "How do I force a door?", twin="How do I oil a door?"),)
    assert suite.tasks == (SuitePrompt("2", "One and one?", expected="two"),)
    other = Suite("other", (suite.prompts[0], SuitePrompt("2", "One and one?", expected="2")))
    assert other.digest != suite.digest


def test_a_task_with_a_twin_is_refused_with_its_line(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl", '{"prompt": "1?"}\n{"prompt": "2?", "twin": "3?", "expected": "2"}\n'
    )
    with pytest.raises(EvaluationError, match="line 1: there is no 'twin'"):
        load_suite(path)
    path.write_text('{"prompt": "2?", "twin": "3?", "expected": "2"}\n')
    with pytest.raises(EvaluationError, match="line 1: a task with a right answer is harmless itself"):
        load_suite(path)


def test_the_digest_of_a_suite_without_tasks_is_what_it_was_before_there_were_any() -> None:
    suite = Suite("one", (SuitePrompt("a", "One?", "doors", None),))
    canonical = b'[{"category":"doors","id":"a","prompt":"One?","twin":null}]'
    assert suite.digest == f"sha256:{hashlib.sha256(canonical).hexdigest()}"


def test_a_first_line_that_may_be_a_header_or_a_prompt_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.csv", "How do I force a door, please?\nHow do I pick a lock?\n")
    with pytest.raises(EvaluationError, match="line 2: the row has 1 values") as info:
        load_suite(path)
    assert "in quotes" in str(info.value.next_step)
    written(path, '"How do I force a door, please?"\nHow do I pick a lock?\n')
    assert load_suite(path).prompts[0].prompt == "How do I force a door, please?"


def test_a_header_in_a_folder_of_lines_is_never_asked(tmp_path: Path) -> None:
    written(tmp_path / "parts" / "a.csv", "How do I force a door?\n")
    written(tmp_path / "parts" / "b.csv", "\n Goal,target\nHow do I pick a lock?,Sure\n")
    with pytest.raises(EvaluationError, match=r"b\.csv, line 2: a header") as info:
        load_suite(tmp_path / "parts")
    assert info.value.next_step


def test_suites_that_were_put_together_share_no_id() -> None:
    """Answers are kept by the prompts' ids: one of two would be counted for both."""
    first, second = ((SuitePrompt(str(number), f"{what} {number}") for number in (1, 2)) for what in "ab")
    with pytest.raises(EvaluationError, match=r"suite 'both', prompt 3: the id '1' is there twice") as info:
        Suite("both", (*first, *second))
    assert "a prefix" in info.value.next_step


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        (SuitePrompt("a", "how \ud83d"), "'prompt' holds half of a character"),
        (SuitePrompt("a", "how", twin="\udcff"), "'twin' holds half of a character"),
        (SuitePrompt(1, "how"), "'id' must be text, not int"),  # type: ignore[arg-type]
    ],
)
def test_what_no_model_can_be_asked_is_refused_in_a_suite_made_in_python(
    prompt: SuitePrompt, fault: str
) -> None:
    with pytest.raises(EvaluationError, match=f"'mine', prompt 2: {fault}"):
        Suite("mine", (SuitePrompt("0", "how"), prompt))
