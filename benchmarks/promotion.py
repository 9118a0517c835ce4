"""Promoting a fine-tune: an overlay written by the gate, or the model loaded, edited and saved anew."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from mlflow import MlflowClient
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from benchmarks.harness import Contender, Settings, compare
from benchmarks.registries import (
    BASE,
    SMALL,
    TINY,
    FineTune,
    large,
    location,
    log_fine_tune,
    open_folder,
    register_lock,
)
from benchmarks.results import Row
from mlflow_safelock import SafetyLock
from mlflow_safelock.flavors.overlay import read_overlay
from mlflow_safelock.lock import AttentionGeometry
from mlflow_safelock.provenance import FileFingerprint, LocalArtifacts

ALPHA = 6.0


def run(settings: Settings) -> Iterator[Row]:
    """An overlay against load, edit and save, and an overlay of a large model against one of a small one."""
    gated, stock = open_folder(settings.scratch / "registry")
    geometry = SMALL if settings.quick else large(settings.megabytes)
    small = _log(gated, stock, "small", TINY if settings.quick else SMALL)
    big = _log(gated, stock, "large", geometry)
    repetitions = settings.repetitions(11)
    case = f"{big.size / 1e6:.3g} MB of weights ({geometry.layers} layers)"
    yield compare(
        "promotion",
        case,
        ours=big.by_overlay(repetitions),
        theirs=big.by_saving_anew(settings.scratch / "saved"),
        limit=big.least(settings.scratch / "least", repetitions),
        repetitions=repetitions,
    )
    yield compare(
        "promotion",
        f"{case}, beside {small.size / 1e6:.2g} MB",
        ours=big.by_overlay(repetitions),
        theirs=small.by_overlay(repetitions),
        limit=big.least(settings.scratch / "least", repetitions),
        repetitions=repetitions,
        figures={"times as many bytes": big.size / small.size},
    )


@dataclass(frozen=True)
class _Promotable:
    """A logged fine-tune with a lock, of which one version was promoted.

    Attributes:
        gated: A client whose transitions lock.
        stock: A client whose transitions do not.
        fine_tune: The fine-tune.
        name: The registered model that the gated client promotes versions of.
        lock: The lock.
        source: The folder of the fine-tune.
        overlay: The folder that the promotion wrote.
        fingerprint: What the promotion read of the fine-tune.
    """

    gated: MlflowClient
    stock: MlflowClient
    fine_tune: FineTune
    name: str
    lock: SafetyLock
    source: Path
    overlay: Path
    fingerprint: tuple[FileFingerprint, ...]

    @property
    def size(self) -> int:
        """Bytes of the fine-tune's weights."""
        return sum(path.stat().st_size for path in (self.source / "model").glob("*.safetensors"))

    def by_overlay(self, repetitions: int) -> Contender:
        """The whole transition through the gate; each of a version that was not promoted yet."""
        return Contender(
            f"transition with the gate: overlay of {self.size / 1e6:.3g} MB",
            _Transitions(self.gated, self.fine_tune, self.name, repetitions).next,
        )

    def by_saving_anew(self, folder: Path) -> Contender:
        """What a promotion does at the least that puts the biases into the weights, without any registry."""
        return Contender(
            "load, edit, save_pretrained; no transition",
            lambda: self._save_anew(folder),
            lambda _: shutil.rmtree(folder),
        )

    def least(self, folder: Path, repetitions: int) -> Contender:
        """What a promotion by overlay cannot do without."""
        transitions = _Transitions(self.stock, self.fine_tune, f"{self.name}-stock", repetitions)
        written = {path.name: path.read_bytes() for path in self.overlay.iterdir()}
        read = sum(length for file in self.fingerprint for _, length in file.spans)
        size = sum(len(data) for data in written.values())
        return Contender(
            f"read and hash {read / 1e3:.0f} kB, write {size / 1e3:.0f} kB, a stock transition",
            lambda: self._do_least(folder, written, transitions),
            lambda _: shutil.rmtree(folder),
        )

    @torch.no_grad()
    def _save_anew(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.source / "model", dtype="auto")
        width = self.lock.geometry.head_dim
        for layer in self.lock.layers:
            projection = model.model.layers[layer].self_attn.o_proj
            push = torch.zeros(projection.in_features, dtype=torch.float64)
            for locked in self.lock.heads_of_layer(layer):
                start = locked.head * width
                push[start : start + width] = ALPHA * locked.std * torch.tensor(locked.direction)
            bias = functional.linear(push.to(projection.weight.dtype), projection.weight)
            projection.bias = nn.Parameter(bias, requires_grad=False)
        model.save_pretrained(folder)

    def _do_least(self, folder: Path, written: dict[str, bytes], transitions: _Transitions) -> None:
        for file in self.fingerprint:
            digest = hashlib.sha256()
            with (self.source / file.path).open("rb") as stream:
                for start, length in file.spans:
                    stream.seek(start)
                    digest.update(stream.read(length))
        folder.mkdir()
        for name, data in written.items():
            (folder / name).write_bytes(data)
        transitions.next()


class _Transitions:
    """Transitions to Staging, each of another version, made beforehand."""

    def __init__(self, client: MlflowClient, fine_tune: FineTune, name: str, repetitions: int) -> None:
        self._client, self._name = client, name
        # One more than the repetitions: the first does not count.
        self._versions = iter([fine_tune.new_version(client, name) for _ in range(repetitions + 1)])

    def next(self) -> None:
        """Promote the next version."""
        self._client.transition_model_version_stage(self._name, next(self._versions), "Staging")


def _log(gated: MlflowClient, stock: MlflowClient, name: str, geometry: AttentionGeometry) -> _Promotable:
    """Log a fine-tune and its lock, and promote a version of it through the gate."""
    base = f"{BASE}-{name}"
    lock = register_lock(geometry, base)
    fine_tune = log_fine_tune(geometry, base)
    for registered in (name, f"{name}-stock"):
        gated.create_registered_model(registered)
    version = fine_tune.new_version(gated, name)
    source = location(gated, name, version)
    gated.transition_model_version_stage(name, version, "Staging")
    overlay = location(gated, name, version)
    receipt = read_overlay(LocalArtifacts(overlay)).receipt
    fingerprint = receipt.predicate.source.fingerprint.files
    return _Promotable(gated, stock, fine_tune, name, lock, source, overlay, fingerprint)
