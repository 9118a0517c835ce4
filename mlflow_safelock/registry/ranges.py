"""Reading many small parts of a remote file in few requests: neighbours together, and several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor

from mlflow_safelock.provenance import Span

PARALLEL_REQUESTS = 16
"""How many parts of one file are requested at once."""

PARALLEL_FILES = 8
"""How many files are read at once."""

MAX_GAP_BYTES = 64 << 10
"""Two parts with a gap of at most this size are requested as one: that many bytes arrive sooner than
another answer does."""

MAX_REQUEST_BYTES = 8 << 20
"""Neighbours are not put together beyond this size, so that large stretches are requested in parallel."""


def group_spans(spans: Sequence[Span]) -> Iterator[tuple[Span, list[int]]]:
    """Neighbouring spans as one; with each, which of the given ones lie in it. Empty spans are in none."""
    order = sorted((number for number, span in enumerate(spans) if span[1]), key=lambda number: spans[number])
    group: list[int] = []
    begin = end = 0
    for number in order:
        start, length = spans[number]
        if group and start - end <= MAX_GAP_BYTES and max(end, start + length) - begin <= MAX_REQUEST_BYTES:
            group.append(number)
            end = max(end, start + length)
            continue
        if group:
            yield (begin, end - begin), group
        group, begin, end = [number], start, start + length
    if group:
        yield (begin, end - begin), group


def read_spans(
    read: Callable[[int, int], bytes], spans: Sequence[Span], executor: Callable[[], Executor]
) -> list[bytes]:
    """The bytes of every span, in order.

    Args:
        read: Reads one span, given its first byte and its length.
        spans: What is wanted.
        executor: Gives what runs several requests at once; not called where there is one.
    """
    groups = list(group_spans(spans))
    found = [b""] * len(spans)

    def fetch(group: tuple[Span, list[int]]) -> None:
        (begin, size), numbers = group
        data = memoryview(read(begin, size))
        for number in numbers:
            start, length = spans[number]
            found[number] = bytes(data[start - begin : start - begin + length])

    if len(groups) < 2:
        for group in groups:
            fetch(group)
    else:
        list(executor().map(fetch, groups))
    return found
