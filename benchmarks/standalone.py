"""A standalone folder: written by links, or the model loaded, edited and saved anew."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from benchmarks.harness import Contender, Settings, compare
from benchmarks.results import Row
from mlflow_safelock import SafetyLock, load_lock
from mlflow_safelock.apply import save_locked_checkpoint
from mlflow_safelock.formats import save_lock

ALPHA = 6.0

_MEASURED = """
import sys
from pathlib import Path
from benchmarks import standalone
from transformers.utils import logging
logging.disable_progress_bar()
getattr(standalone, sys.argv[1])(*map(Path, sys.argv[2:]))
print(standalone.peak_memory())
"""


def run(settings: Settings) -> Iterator[Row]:
    """Links and biases, confirmed by structure, against load, edit and save."""
    # Not above: a process whose memory is measured imports this module, and needs none of that.
    from benchmarks.registries import SMALL, large
    from tests.models import random_lock, tiny_tokenizer
    from tests.thin_llama import thin_llama

    geometry = SMALL if settings.quick else large(settings.megabytes)
    source, lock = settings.scratch / "standalone", settings.scratch / "standalone-lock.safetensors"
    thin_llama(geometry, key_value_heads=max(1, geometry.heads // 4)).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    save_lock(random_lock(geometry, min(24, geometry.layers * geometry.heads // 2)), lock)
    case = _Case(source, lock, settings.scratch)
    ours, theirs = case.folder("ours"), case.folder("theirs")
    figures = {
        "peak memory of ours, MB": case.memory_of("by_links", ours),
        "peak memory of theirs, MB": case.memory_of("by_saving_anew", theirs),
        "bytes written by ours": float(_bytes_of_its_own(ours)),
        "bytes written by theirs": float(_bytes_of_its_own(theirs)),
    }
    small = {path.name: path.read_bytes() for path in ours.iterdir() if path.stat().st_nlink == 1}
    shutil.rmtree(theirs)
    shutil.rmtree(ours)
    repetitions = settings.repetitions(7)
    yield compare(
        "standalone",
        f"{case.size / 1e6:.3g} MB of weights ({geometry.layers} layers), one filesystem",
        ours=Contender(
            "shared files and biases, confirmed by structure",
            lambda: by_links(ours, source, lock),
            case.clear,
        ),
        theirs=Contender(
            "load, edit, save_pretrained", lambda: by_saving_anew(theirs, source, lock), case.clear
        ),
        limit=Contender(
            f"link the weights, write {sum(map(len, small.values())) / 1e3:.0f} kB to the disk",
            lambda: case.least(small),
            case.clear,
        ),
        repetitions=repetitions,
        figures=figures,
    )


def by_links(folder: Path, source: Path, lock: Path) -> None:
    """Write a locked checkpoint this project's way."""
    save_locked_checkpoint(source, folder, load_lock(lock), ALPHA, verify="structure")


@torch.no_grad()
def by_saving_anew(folder: Path, source: Path, lock: Path) -> None:
    """Put the biases into a loaded model and save it; nothing of it is confirmed."""
    safety_lock = load_lock(lock)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    for layer in safety_lock.layers:
        projection = model.model.layers[layer].self_attn.o_proj
        push = _push(safety_lock, layer, projection.in_features).to(projection.weight.dtype)
        projection.bias = nn.Parameter(functional.linear(push, projection.weight), requires_grad=False)
    model.save_pretrained(folder)


def peak_memory() -> float:
    """The most memory that this process ever had, in MB.

    Not ``ru_maxrss`` where there is better: that also counts what its parent had when it was started.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024 / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@dataclass(frozen=True)
class _Case:
    """A fine-tune, a lock, and room for what is made of them.

    Attributes:
        source: The fine-tune.
        lock: The file of the lock.
        scratch: The room.
    """

    source: Path
    lock: Path
    scratch: Path

    @property
    def size(self) -> int:
        """Bytes of the fine-tune's weights."""
        return sum(path.stat().st_size for path in self.source.glob("*.safetensors"))

    def folder(self, name: str) -> Path:
        """A folder to write."""
        return self.scratch / f"standalone-{name}"

    def memory_of(self, way: str, folder: Path) -> float:
        """Peak memory, in MB, of a process that does nothing else; leaves the folder that it wrote."""
        command = [sys.executable, "-c", _MEASURED, way, str(folder), str(self.source), str(self.lock)]
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    def least(self, small: dict[str, bytes]) -> None:
        """What a folder by links cannot do without."""
        folder = self.folder("least")
        folder.mkdir()
        for path in self.source.glob("*.safetensors"):
            os.link(path, folder / path.name)
        for name, data in small.items():
            with (folder / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def clear(self, _result: object) -> None:
        """Remove what was written."""
        for name in ("ours", "theirs", "least"):
            shutil.rmtree(self.folder(name), ignore_errors=True)


def _push(lock: SafetyLock, layer: int, width: int) -> torch.Tensor:
    push, head_dim = torch.zeros(width, dtype=torch.float64), lock.geometry.head_dim
    for locked in lock.heads_of_layer(layer):
        start = locked.head * head_dim
        push[start : start + head_dim] = ALPHA * locked.std * torch.tensor(locked.direction)
    return push


def _bytes_of_its_own(folder: Path) -> int:
    statuses = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(status.st_size for status in statuses if status.st_nlink == 1)
