"""What is shown is safe on a terminal and whole in a pipe."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.output import counted, new_table, show_json, show_lines, show_table, shown


def output_of(work: Callable[[], object]) -> str:
    return CliRunner().invoke(Command("work", callback=work), [], catch_exceptions=False).stdout


@given(st.text())
def test_nothing_shown_can_steer_a_terminal(text: str) -> None:
    assert all(character.isprintable() or character == "\n" for character in shown(text))


def test_values_are_shown_as_people_write_them() -> None:
    assert [shown(value) for value in (None, "", 6.0, 0.12345678, "Zoë", "a\x1b[31mb", 3)] == [
        "-",
        "-",
        "6",
        "0.123457",
        "Zoë",
        "a\\x1b[31mb",
        "3",
    ]


def test_a_table_in_a_pipe_is_whole_and_plain() -> None:
    long = "x" * 500

    def work() -> None:
        table = new_table(None, "name", "value")
        table.add_row("[red]not markup[/red] :smile:", long)
        show_table(table)

    text = output_of(work)
    assert long in text
    assert "[red]not markup[/red] :smile:" in text
    assert "\x1b" not in text
    assert text == "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def test_json_is_json_whatever_the_text() -> None:
    value = {"name": "Zoë \x1b[0m", "none": None, "alpha": 6.0}
    assert json.loads(output_of(lambda: show_json(value))) == value


def test_lines_are_not_wrapped() -> None:
    line = "word " * 100 + "end"
    assert output_of(lambda: show_lines(line)) == f"{line}\n"


@pytest.mark.parametrize("count", [0, 3])
def test_counting_rows_changes_nothing_about_them(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    assert counted(iter(range(count)), "Rows") == list(range(count))
    assert stream.getvalue() == ""


def test_click_knows_no_context_outside_a_command() -> None:
    with pytest.raises(RuntimeError, match="no active click context"):
        show_lines("lost")
    assert click.get_current_context(silent=True) is None
