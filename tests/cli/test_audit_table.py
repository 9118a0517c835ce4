"""The audit's table shows what rows say, whatever they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from click.testing import CliRunner

from mlflow_safelock.audit import AuditRow
from mlflow_safelock.cli.audit_table import show_rows
from mlflow_safelock.cli.command import Command

ROW = AuditRow(
    workspace="default",
    model="bot",
    version=1,
    stage="Staging",
    aliases=("blue", "champion"),
    state="locked",
    lock_name="safelock.org--base",
    lock_version=3,
    lock_digest="sha256:" + "ab" * 32,
    base_model="org/base",
    alpha=6.5,
    when="2026-01-31T12:34:56.789+02:00",
    by="ada",
    by_verified=True,
    evidence="ledger",
    drift=(),
)


def lines_of(*rows: AuditRow) -> list[str]:
    command = Command("work", callback=lambda: show_rows(rows))
    return CliRunner().invoke(command, [], catch_exceptions=False).stdout.splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("   ") if cell.strip()]


def test_a_row_is_shown_with_its_time_to_the_minute_in_utc() -> None:
    header, _, line, *_ = lines_of(ROW)
    names = [
        "model",
        "version",
        "stage",
        "aliases",
        "state",
        "lock",
        "digest",
        "alpha",
        "when",
        "by",
        "evidence",
    ]
    values = [
        "bot",
        "1",
        "Staging",
        "blue, champion",
        "locked",
        "safelock.org--base v3",
        "abababababab",
        "6.5",
    ]
    assert cells(header) == names
    assert cells(line) == [*values, "2026-01-31 10:34 UTC", "ada (verified)", "ledger"]


@pytest.mark.parametrize("when", ["yesterday", "9999-99-99"])
def test_a_time_that_is_none_is_shown_as_it_is(when: str) -> None:
    assert when in cells(lines_of(replace(ROW, when=when))[2])


def test_workspaces_are_shown_where_there_are_several() -> None:
    assert "workspace" not in lines_of(ROW, ROW)[0]
    header, _, first, second, *_ = lines_of(ROW, replace(ROW, workspace="team-b"))
    assert cells(header)[0] == "workspace"
    assert (cells(first)[0], cells(second)[0]) == ("default", "team-b")


def test_it_is_said_where_biases_were_not_looked_at() -> None:
    said = "bot version 1: Biases of its own were not compared with the lock's (own_biases: ignore)."
    assert said in lines_of(replace(ROW, own_biases="ignore"))
    assert said not in lines_of(replace(ROW, own_biases="check"))


def test_each_state_is_counted_and_each_drift_named() -> None:
    copy = replace(ROW, state="locked (copy)", drift=("It serves another.", "A tag says more."))
    lines = lines_of(ROW, copy, replace(ROW, state="unknown"), replace(ROW, state="unlocked"))
    assert "bot version 1: It serves another." in lines
    assert "bot version 1: A tag says more." in lines
    assert lines[-1] == "1 locked, 1 locked (copy), 1 unlocked, 1 unknown"
