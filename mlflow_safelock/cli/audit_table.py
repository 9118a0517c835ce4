"""The audit as a table."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from mlflow_safelock.cli.output import new_table, show_lines, show_table, shown

if TYPE_CHECKING:
    from rich.text import Text

    from mlflow_safelock.audit import AuditRow

STYLES = {"locked": "green", "locked (copy)": "yellow", "unlocked": "red", "unknown": "bold red"}
"""How each state is coloured; also the order in which they are counted."""


def show_rows(rows: Sequence[AuditRow]) -> None:
    """Show audit rows as a table; below it what disagrees with the evidence, and a count of each state."""
    several = len({row.workspace for row in rows}) > 1
    versions = ("model", "version", "stage", "aliases", "state")
    locks = ("lock", "digest", "alpha", "when", "by", "evidence")
    table = new_table(None, *(("workspace",) if several else ()), *versions, *locks)
    for row in rows:
        workspace = (shown(row.workspace),) if several else ()
        version = (shown(row.model), str(row.version), shown(row.stage), shown(", ".join(row.aliases)))
        table.add_row(*workspace, *version, _coloured(row.state), *map(shown, _lock_cells(row)))
    show_table(table)
    show_lines(
        "", *(shown(f"{row.model} version {row.version}: {fact}") for row in rows for fact in _facts(row))
    )
    counts = {state: sum(row.state == state for row in rows) for state in STYLES}
    show_lines(", ".join(f"{count} {state}" for state, count in counts.items() if count))


def _facts(row: AuditRow) -> tuple[str, ...]:
    return (*row.findings, *row.drift, *row.notes)


def _lock_cells(row: AuditRow) -> tuple[object, ...]:
    lock = None if row.lock_name is None else f"{row.lock_name} v{row.lock_version}"
    digest = None if row.lock_digest is None else row.lock_digest.removeprefix("sha256:")[:12]
    by = None if row.by is None else f"{row.by} ({'verified' if row.by_verified else 'claimed'})"
    return lock, digest, row.alpha, _minute(row.when), by, row.evidence


def _minute(when: str | None) -> str | None:
    """A time as people read it, to the minute; JSON has it in full.

    A receipt may say anything, and what is no time is shown as it is.
    """
    try:
        return when and datetime.fromisoformat(when).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return when


def _coloured(state: str) -> Text:
    from rich.text import Text

    return Text(state, style=STYLES[state])
