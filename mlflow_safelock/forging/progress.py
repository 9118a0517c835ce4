"""Progress bars, on the error stream, so that standard output stays what a program prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def tracked(items: Sequence[T], description: str, *, progress: bool) -> Iterable[T]:
    """The items, one by one, with a bar that is gone when they are done.

    Args:
        items: What is gone through.
        description: What is being done.
        progress: Whether to show the bar; on a terminal only.
    """
    console = Console(stderr=True)
    shown = progress and console.is_terminal
    return track(items, description, console=console, transient=True, disable=not shown)
