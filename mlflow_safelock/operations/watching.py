"""Passes over a registry again and again: the companion of a server that has no gate of its own."""

from __future__ import annotations

import logging
import queue
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Literal

from mlflow_safelock.errors import SafelockError
from mlflow_safelock.gate.reconciling import Repair, Way
from mlflow_safelock.operations.reconciliation import Reconciliation

_logger = logging.getLogger(__name__)


@dataclass
class Watcher:
    """Puts right what comes past the gate, soon after it does.

    Attributes:
        reconciliation: One pass.
        ways: What a pass may do.
        interval: Seconds from the end of a pass to the next, where nothing wakes it earlier.
        tell: Is told of every repair, and of every difference that is left, once while it stays the same.
    """

    reconciliation: Reconciliation
    ways: Collection[Way]
    interval: float
    tell: Callable[[Repair], None]
    # Such a queue may be put to from a signal's handler, an event's lock may not.
    _calls: queue.SimpleQueue[Literal["pass", "stop"]] = field(default_factory=queue.SimpleQueue, init=False)
    _left: dict[tuple[str, str, int], str] = field(default_factory=dict, init=False)

    def wake(self) -> None:
        """Have the next pass begin now, or right after the one that is under way."""
        self._calls.put("pass")

    def stop(self) -> None:
        """Have ``run`` return, after the pass that is under way."""
        self._calls.put("stop")

    def run(self) -> None:
        """Pass over the registry until somebody stops it; a pass that fails is logged, and made again."""
        while True:
            self._pass()
            if "stop" in self._calls_since():
                return

    def _calls_since(self) -> set[str]:
        """What was called for since the pass began; waits for the first call as long as the interval."""
        calls: set[str] = set()
        try:
            calls.add(self._calls.get(timeout=self.interval))
            while True:
                calls.add(self._calls.get_nowait())
        except queue.Empty:
            return calls

    def _pass(self) -> None:
        left: dict[tuple[str, str, int], str] = {}
        try:
            for repair in self.reconciliation.repairs(self.ways):
                request = repair.difference.request
                version = request.workspace, request.name, request.version
                if repair.done is None:
                    left[version] = f"{repair.difference.what} {_stable(repair)}"
                if repair.done is not None or self._left.get(version) != left[version]:
                    self.tell(repair)
        except SafelockError as error:
            _logger.error("This pass ended early, and is made again: %s", error)
            return
        except Exception:
            _logger.exception("This pass failed, and is made again")
            return
        self._left = left


def _stable(repair: Repair) -> str:
    """Why a version is left, in words that are the same in each pass: a store may have others each time."""
    refusal = repair.refusal
    return refusal.reason if refusal is not None and not repair.difference.is_told else str(refusal)


@contextmanager
def stopped_by_signals(watcher: Watcher) -> Iterator[None]:
    """Have SIGTERM and SIGINT stop a watcher after the pass that is under way."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        watcher.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
