"""Many small pieces of work on all cores: a piece to a core, rather than all cores to a piece.

Small tensors leave the cores waiting for each other when they share one operation. A piece that has a core to
itself leaves none waiting, and gives the same bits on machines with few and with many cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


@contextmanager
def started_on_all_cores(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], device: torch.device
) -> Iterator[Sequence[Future[Result]]]:
    """Start ``work`` on every piece, in inference mode; what has not begun on leaving never does.

    Args:
        work: Does one piece.
        pieces: What to do.
        device: Where it is done. Only a CPU has cores to divide; elsewhere one piece goes after the other.
    """
    threads = torch.get_num_threads()
    is_cpu = device.type == "cpu"

    def alone() -> None:
        if is_cpu:
            torch.set_num_threads(1)

    def inferred(piece: Piece) -> Result:
        with torch.inference_mode():
            return work(piece)

    pool = ThreadPoolExecutor(threads if is_cpu else 1, "safelock-probes", initializer=alone)
    try:
        yield [pool.submit(inferred, piece) for piece in pieces]
    finally:
        pool.shutdown(cancel_futures=True)
        if is_cpu:
            torch.set_num_threads(threads)  # the limit of one is also that of threads yet to be started
