"""Telling how far the moving of large files is."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Is told what is being done, how many bytes of it are, and of how many."""


def silent(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody looks at."""


class Meter:
    """Adds up the bytes that are moved, by several threads at once.

    Args:
        what: What is being done.
        total: How many bytes there are.
        show: Who is told.
    """

    def __init__(self, what: str, total: int, show: Progress) -> None:
        self._what, self._total, self._show = what, total, show
        self._done, self._lock = 0, threading.Lock()
        show(what, 0, total)

    def add(self, count: int) -> None:
        """Count bytes that were moved."""
        with self._lock:
            self._done += count
            self._show(self._what, self._done, self._total)
