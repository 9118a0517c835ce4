"""What a run of the benchmarks finds out, as plain data; the JSON file is this."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Timing(_Part):
    """How long something took, over all its repetitions.

    Attributes:
        what: What was done.
        best: Seconds of the quickest repetition: nearest to what an idle machine needs.
        median: Seconds.
        low: Seconds; a quarter of the repetitions was quicker.
        high: Seconds; a quarter of the repetitions was slower.
        p95: Seconds; one repetition in twenty was slower.
        repetitions: How often it was done.
    """

    what: str
    best: float
    median: float
    low: float
    high: float
    p95: float
    repetitions: int

    @classmethod
    def of(cls, what: str, seconds: Sequence[float]) -> Timing:
        """The timing of repetitions that took these seconds."""
        best, low, median, high, p95 = np.percentile(seconds, [0, 25, 50, 75, 95]).tolist()
        return cls(what=what, best=best, median=median, low=low, high=high, p95=p95, repetitions=len(seconds))


class Ratio(_Part):
    """How many times longer the other way took, repetition by repetition; above 1, ours is quicker.

    Attributes:
        median: The median over the repetitions.
        low: A quarter of the repetitions was below.
        high: A quarter of the repetitions was above.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """The ratio of repetitions that were done in pairs."""
        ratios = [other / own for own, other in zip(ours, theirs, strict=True)]
        low, median, high = np.percentile(ratios, [25, 50, 75]).tolist()
        return cls(median=median, low=low, high=high)


class Limit(_Part):
    """What cannot be done without, measured in the same run.

    Attributes:
        what: What it is, with its bytes, requests or operations.
        seconds: The median of how long that alone takes.
        share: ``seconds`` as a share of the median of ours: 1 is at the limit.
    """

    what: str
    seconds: float
    share: float

    @classmethod
    def of(cls, what: str, seconds: Sequence[float], ours: Sequence[float]) -> Limit:
        """The limit of something that took ``ours`` seconds."""
        limit = statistics.median(seconds)
        return cls(what=what, seconds=limit, share=limit / statistics.median(ours))


class Row(_Part):
    """One comparison.

    Attributes:
        benchmark: Name of the benchmark.
        case: What it was done with.
        ours: How long this project's way took.
        theirs: How long the other way took.
        ratio: ``theirs`` over ``ours``.
        limit: The physical limit of ours.
        figures: What else was measured, by name with the unit.
    """

    benchmark: str
    case: str
    ours: Timing
    theirs: Timing
    ratio: Ratio
    limit: Limit
    figures: dict[str, float]


class Machine(_Part):
    """Where it was measured.

    Attributes:
        processor: Model name of the processor.
        cores: Cores that this process may use.
        threads: Threads that torch computes with.
        memory_gib: Main memory.
        copy_gb_per_s: Bytes read plus bytes written in a second, when a large block is copied.
        load_before: Processes that ran or waited to run, over the minute before.
        load_after: The same at the end.
        software: Versions.
    """

    processor: str
    cores: int
    threads: int
    memory_gib: float
    copy_gb_per_s: float
    load_before: float
    load_after: float
    software: dict[str, str]


class Results(_Part):
    """A run of the benchmarks.

    Attributes:
        format_version: Version of this form.
        started: When, ISO 8601 in UTC.
        seconds: How long all of it took.
        quick: Whether sizes were cut down to see that everything runs; such figures mean nothing.
        machine: Where.
        rows: What was found.
    """

    format_version: Literal[1]
    started: str
    seconds: float
    quick: bool
    machine: Machine
    rows: tuple[Row, ...]
