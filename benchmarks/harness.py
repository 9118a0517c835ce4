"""Measuring things side by side: in turns, in one run, so that what disturbs one disturbs the others."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results import Limit, Ratio, Row, Timing


def _nothing(_result: Any) -> None:
    """Leave a result alone."""


@dataclass(frozen=True)
class Contender:
    """Something that is measured.

    Attributes:
        what: What it does, for the reader of the results.
        run: Does it; only this is timed.
        finish: Puts everything back, given what ``run`` returned.
        times: How many times the seconds of one ``run`` count.
    """

    what: str
    run: Callable[[], Any]
    finish: Callable[[Any], None] = _nothing
    times: float = 1.0


@dataclass(frozen=True)
class Settings:
    """What a benchmark is asked to do.

    Attributes:
        scratch: Folder for its files.
        shared: The reference data with the published locks, where there is any.
        quick: Whether to cut sizes and repetitions down to see that everything runs.
        megabytes: Size of the weights of the model that is promoted and loaded.
        probe_heads: Number of heads that are probed.
    """

    scratch: Path
    shared: Path | None
    quick: bool
    megabytes: int
    probe_heads: int

    def repetitions(self, usual: int) -> int:
        """How often to repeat something that is usually repeated ``usual`` times."""
        return min(usual, 2) if self.quick else usual


def compare(
    benchmark: str,
    case: str,
    *,
    ours: Contender,
    theirs: Contender,
    limit: Contender,
    repetitions: int,
    figures: Mapping[str, float] | None = None,
    cpu: bool = False,
) -> Row:
    """Measure ours, theirs and the limit in turns.

    Args:
        benchmark: Name of the benchmark.
        case: What it is done with.
        ours: This project's way.
        theirs: The other way.
        limit: What ours cannot do without.
        repetitions: How often each is measured, after one run that is not.
        figures: What else was measured, by name with the unit.
        cpu: Whether to tell the CPU time of this process, too, which other work on the machine disturbs less.
    """
    turns = _take_turns((ours, theirs, limit), repetitions)
    own, other, least = (tuple(turn.seconds) for turn in turns)
    found = dict(figures or {})
    if cpu:
        own_cpu, other_cpu = (statistics.median(turn.cpu_seconds) for turn in turns[:2])
        found |= {"CPU seconds of ours": own_cpu, "CPU seconds of theirs": other_cpu}
    return Row(
        benchmark=benchmark,
        case=case,
        ours=Timing.of(ours.what, own),
        theirs=Timing.of(theirs.what, other),
        ratio=Ratio.of(own, other),
        limit=Limit.of(limit.what, least, own),
        figures=found,
    )


def take_turns(contenders: Sequence[Contender], repetitions: int) -> tuple[tuple[float, ...], ...]:
    """The seconds of every repetition of every contender.

    All run once before anything counts. In every later round each runs once, and another one begins.
    """
    return tuple(tuple(turn.seconds) for turn in _take_turns(contenders, repetitions))


def _take_turns(contenders: Sequence[Contender], repetitions: int) -> list[_Turns]:
    turns = [_Turns(contender) for contender in contenders]
    for turn in turns:
        turn.measure()
        turn.seconds.clear()
        turn.cpu_seconds.clear()
    gc.collect()
    for number in range(repetitions):
        first = number % len(turns)
        for turn in (*turns[first:], *turns[:first]):
            turn.measure()
    return turns


@dataclass
class _Turns:
    contender: Contender
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def measure(self) -> None:
        gc.disable()
        try:
            started, cpu_started = time.perf_counter(), time.process_time()
            result = self.contender.run()
            self.seconds.append((time.perf_counter() - started) * self.contender.times)
            self.cpu_seconds.append((time.process_time() - cpu_started) * self.contender.times)
        finally:
            gc.enable()
        self.contender.finish(result)
