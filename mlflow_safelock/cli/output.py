"""Showing results and progress: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from mlflow_safelock.cli.command import results

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn, TaskID
    from rich.table import Table

T = TypeVar("T")

UNWRAPPED = 100_000
"""Width of what is no terminal, in characters: nothing is cut or folded where a program may read it."""


def show_json(value: Any) -> None:
    """Write plain values to the result stream as JSON."""
    results().write(json.dumps(value, indent=2) + "\n")


def show_lines(*lines: str) -> None:
    """Write lines to the result stream."""
    console = _console(results())
    for line in lines:
        console.print(line, soft_wrap=True)


def show_table(table: Table) -> None:
    """Write a table to the result stream; colours only on a terminal, padding neither."""
    console = _console(results())
    with console.capture() as capture:
        console.print(table)
    # A terminal's lines end in codes, and its padding shows nowhere.
    text = capture.get()
    if not console.is_terminal:
        text = "\n".join(line.rstrip() for line in text.splitlines()).strip("\n") + "\n"
    results().write(text)


def new_table(title: str | None = None, *columns: str) -> Table:
    """An empty table; where no columns are named, one of names and values."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        show_header=bool(columns),
    )
    for column in columns or ("", ""):
        table.add_column(column, overflow="fold")
    return table


def facts_table(title: str, facts: Iterable[tuple[str, object]]) -> Table:
    """A table of names and values."""
    table = new_table(title)
    for name, value in facts:
        table.add_row(name, shown(value))
    return table


def shown(value: object) -> str:
    """A value as a cell: a dash for none, control characters spelled out.

    Names, tags and model answers come from others, and a terminal must not act on what is in them.
    """
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    return "".join(
        character if character.isprintable() or character == "\n" else ascii(character)[1:-1]
        for character in str(value)
    )


def announce(what: str) -> None:
    """Say what happens next, where the libraries show their own bars while it does."""
    _console(sys.stderr).print(f"{shown(what)} …", soft_wrap=True)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show that something is under way: a spinner on a terminal, a line elsewhere."""
    console = _console(sys.stderr)
    if not console.is_terminal:
        announce(what)
        yield
        return
    with console.status(f"{shown(what)} …"):
        yield


def moving() -> AbstractContextManager[Callable[[str, int, int], None]]:
    """Show how many bytes were moved, on a terminal; gives what is to be told of it."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    return _bars(DownloadColumn(), TransferSpeedColumn())


def counting() -> AbstractContextManager[Callable[[str, int, int], None]]:
    """Show how many of something are done, on a terminal; gives what is to be told of it."""
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    return _bars(MofNCompleteColumn(), TimeRemainingColumn())


@contextmanager
def _bars(*figures: ProgressColumn) -> Iterator[Callable[[str, int, int], None]]:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), *figures
    console = _console(sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield told


def in_words(ways: Iterable[str]) -> str:
    """How several files came where they are: ``2 hard link, 1 copy``."""
    return ", ".join(f"{count} {way}" for way, count in Counter(ways).items())


def counted(rows: Iterable[T], what: str) -> list[T]:
    """Collect rows that arrive slowly, showing how many there are so far."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn(f"{what}: {{task.completed:.0f}}"), TimeElapsedColumn()
    console = _console(sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        return list(progress.track(rows, total=None))


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    # No markup: a model's name in square brackets is a name.
    console = Console(file=stream, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(
            file=stream, markup=False, emoji=False, highlight=False, width=UNWRAPPED, color_system=None
        )
    return console
