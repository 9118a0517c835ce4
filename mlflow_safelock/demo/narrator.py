"""Telling a person at a terminal what the demo does, on the error stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

STEPS = 7


class Narrator:
    """Numbers the steps, shows bars, and prints what came out."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._step = 0

    def step(self, text: str) -> None:
        """Begin the next step."""
        self._step += 1
        self._console.print(f"\n[bold]{self._step}/{STEPS}[/bold] {text}", highlight=False)

    def say(self, text: str) -> None:
        """Print a line that belongs to the step."""
        self._console.print(f"    {text}", highlight=False, markup=False)

    @contextmanager
    def bar(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar; what it gives is called once per piece of work."""
        columns = (
            TextColumn("    {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(text, total=total)
            yield lambda: progress.advance(task)

    def answers(self, prompts: Sequence[str], columns: dict[str, Sequence[str]]) -> None:
        """A table of what several models answer to the same prompts."""
        table = Table(show_lines=True)
        for heading in ("prompt", *columns):
            table.add_column(heading, overflow="fold")
        for row in zip(prompts, *columns.values(), strict=True):
            table.add_row(*row)
        self._console.print(table)
