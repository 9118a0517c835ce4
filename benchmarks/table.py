"""The results as a table for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks.results import Machine, Row, Timing

WIDTH = 160
"""Columns of text where the output is no terminal."""


def make_console() -> Console:
    """A console that is wide enough for the table, whatever the output is."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def table_of(rows: tuple[Row, ...]) -> Table:
    """One row for every comparison."""
    table = Table(title="ratio = theirs / ours: above 1, ours is quicker", show_lines=True)
    for heading in ("what", "ours", "theirs", "ratio", "physical limit", "ours is at"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(
            f"[bold]{row.benchmark}[/bold]\n{row.case}",
            _timing(row.ours),
            _timing(row.theirs),
            f"[bold]{row.ratio.median:.3g}[/bold]\n{row.ratio.low:.3g} to {row.ratio.high:.3g}",
            f"[bold]{duration(row.limit.seconds)}[/bold]\n{row.limit.what}",
            f"{row.limit.share:.0%} of it\n" + "\n".join(_figures(row)),
        )
    return table


def machine_line(machine: Machine) -> str:
    """Where it was measured, in a line."""
    return (
        f"{machine.processor}, {machine.cores} cores, {machine.threads} torch threads, "
        f"{machine.memory_gib:g} GiB, copies {machine.copy_gb_per_s:g} GB/s, "
        f"load {machine.load_before:g} before and {machine.load_after:g} after"
    )


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _timing(timing: Timing) -> str:
    spread = f"{duration(timing.low)} to {duration(timing.high)}, p95 {duration(timing.p95)}"
    return (
        f"[bold]{duration(timing.median)}[/bold] ({spread}; best of {timing.repetitions}: "
        f"{duration(timing.best)})\n{timing.what}"
    )


def _figures(row: Row) -> list[str]:
    return [f"{name}: {value:.3g}" for name, value in row.figures.items()]
