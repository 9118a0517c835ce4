"""The machine that the benchmarks run on."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.results import Machine

PACKAGES = ("mlflow-safelock", "mlflow", "torch", "transformers", "numpy", "scikit-learn")

_COPIED_NUMBERS = 1 << 26
_COPIES = 5


def describe(load_before: float) -> Machine:
    """The machine, and how busy it is at the end of a run.

    Args:
        load_before: ``load()`` at the beginning of the run.
    """
    software = {name: version(name) for name in PACKAGES}
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        copy_gb_per_s=round(_copy_bandwidth(), 1),
        load_before=load_before,
        load_after=load(),
        software={"python": platform.python_version(), "system": platform.system(), **software},
    )


def load() -> float:
    """Processes that ran or waited to run, over the last minute."""
    return round(os.getloadavg()[0], 2)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _copy_bandwidth() -> float:
    """Gigabytes read and written per second: the best of some copies of 256 MB."""
    source = torch.ones(_COPIED_NUMBERS)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(_COPIES):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds) / 1e9
