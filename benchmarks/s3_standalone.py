"""A standalone model beside a fine-tune on S3: what passes through the client, and what the store copies."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import mlflow

from benchmarks.harness import Contender, Settings, compare
from benchmarks.registries import BASE
from benchmarks.results import Row
from benchmarks.s3_traffic import Traffic
from mlflow_safelock.apply import save_locked_checkpoint
from mlflow_safelock.apply.checkpoint.progress import silent
from mlflow_safelock.flavors.standalone import (
    WEIGHTS_FOLDER,
    Standalone,
    WeightsFile,
    read_standalone,
    write_standalone,
)
from mlflow_safelock.lock import AttentionGeometry, SafetyLock
from mlflow_safelock.provenance import LockReference
from mlflow_safelock.registry.artifacts import RegistryArtifacts
from mlflow_safelock.registry.derived import mirror_what_a_lock_needs
from mlflow_safelock.registry.s3 import S3Artifacts
from mlflow_safelock.registry.s3_copies import S3Copies
from mlflow_safelock.registry.s3_publication import S3Publication
from tests.models import random_lock, tiny_tokenizer
from tests.thin_llama import thin_llama

ALPHA = 6.0
GOAL = 3.0
"""Most bytes, in percent of the model's, that may pass through the client."""

SMALL_LLAMA = AttentionGeometry(layers=8, heads=10, head_dim=128, hidden=1280)
"""Llama-3-8B with 10 of 32 heads and a quarter of its layers: locked layers have the same share of its bytes.

It is this small because moto reads a whole object for each part of it that is asked for.
"""

QUICK = AttentionGeometry(layers=8, heads=4, head_dim=16, hidden=64)


def measure(settings: Settings, bucket: str) -> Row:
    """Let the store copy the weights, against downloading, locking and uploading them."""
    geometry = QUICK if settings.quick else SMALL_LLAMA
    case = _Case(f"s3://{bucket}/standalone/source", _lock(geometry), settings.scratch / "s3-standalone")
    _upload(geometry, case)
    row = compare(
        "s3",
        f"standalone of {case.size / 1e6:.3g} MB of weights on S3",
        ours=Contender(
            "the store copies the weights; biases and small files are uploaded", case.by_copies, case.clear
        ),
        theirs=Contender("download_artifacts, save_locked_checkpoint, upload", case.by_download, case.clear),
        limit=Contender(
            "copies by the store; read the projections of the locked layers", case.least, case.clear
        ),
        repetitions=settings.repetitions(1),
    )
    traffic = case.traffic
    figures = {
        "bytes through the client, % of the model": 100 * (traffic.received + traffic.sent) / case.size,
        "goal, %": GOAL,
        "MB received": traffic.received / 1e6,
        "MB sent": traffic.sent / 1e6,
        "requests": float(traffic.requests),
        "copies by the store": float(traffic.copies),
    }
    return row.model_copy(update={"figures": figures})


@dataclass
class _Case:
    """A fine-tune on S3, a lock, and where what is made of them goes.

    Attributes:
        source: The fine-tune.
        lock: The lock.
        scratch: A local folder.
        traffic: What passed through the client when the store made the copies, last.
        copied: The files that it copied then.
    """

    source: str
    lock: SafetyLock
    scratch: Path
    traffic: Traffic = field(default_factory=Traffic, init=False)
    copied: tuple[WeightsFile, ...] = field(default=(), init=False)
    _numbers: Iterator[int] = field(default_factory=count, init=False)

    @property
    def size(self) -> int:
        """Bytes of the fine-tune's weights."""
        files = S3Artifacts(self.source).files()
        return sum(file.size for file in files if file.path.endswith(".safetensors"))

    def by_copies(self) -> None:
        """What safelock prepare does once the gate has approved it."""
        place, self.traffic = self._new_place(), Traffic()
        with self.traffic.counted():
            self.copied = self._derive(place).weights
            read_standalone(S3Artifacts(place))

    def _derive(self, place: str) -> Standalone:
        reference = LockReference(
            digest=self.lock.digest, base_model=self.lock.base_model, model=None, version=None
        )
        return RegistryArtifacts().derive(
            self.source,
            place,
            self.lock,
            lambda source, folder, complete: write_standalone(
                folder,
                source,
                S3Artifacts(self.source),
                self.source,
                self.lock,
                reference,
                ALPHA,
                None,
                complete=complete,
            ),
        )

    def by_download(self) -> None:
        """All bytes here, and all bytes back."""
        source = mlflow.artifacts.download_artifacts(self.source, dst_path=str(self.scratch / "source"))
        locked = self.scratch / "locked"
        locked.mkdir()
        save_locked_checkpoint(source, locked / WEIGHTS_FOLDER, self.lock, ALPHA, verify="structure")
        with S3Publication(S3Artifacts(self._new_place())) as publication:
            publication.put_folder(locked)

    def least(self) -> None:
        """What cannot be done without."""
        source = S3Artifacts(self.source)
        mirror_what_a_lock_needs(source, self.lock, self.scratch / "mirror")
        S3Copies(source, S3Artifacts(self._new_place())).make(self.copied, silent)

    def clear(self, _result: object) -> None:
        """Remove what was written, here and on S3, which moto keeps in memory."""
        shutil.rmtree(self.scratch)
        self.scratch.mkdir()
        place = S3Artifacts(f"{self.source}-safelock")
        for file in place.files():
            place.client.delete_object(Bucket=place.bucket, Key=place.key(file.path))

    def _new_place(self) -> str:
        return f"{self.source}-safelock/{next(self._numbers)}"


def _lock(geometry: AttentionGeometry) -> SafetyLock:
    """A lock of three layers of eight, as the published locks of Llama-3-8B are of 12 layers of 32."""
    drawn = random_lock(geometry, geometry.layers * geometry.heads, base_model=BASE)
    heads = tuple(locked for locked in drawn.heads if locked.layer % 3 == 1)
    return SafetyLock(heads, drawn.metadata, drawn.scores)


def _upload(geometry: AttentionGeometry, case: _Case) -> None:
    """Put a model with all proportions of Llama-3-8B where the case has its fine-tune."""
    hidden = geometry.hidden
    model = thin_llama(
        geometry,
        key_value_heads=geometry.heads // 4,
        intermediate=hidden * 7 // 2,
        vocabulary=max(512, 8 * hidden),
    )
    case.scratch.mkdir()
    folder = case.scratch / "logged"
    mlflow.transformers.save_model(
        {"model": model, "tokenizer": tiny_tokenizer()},
        folder,
        task="text-generation",
        pip_requirements=["mlflow", "torch", "transformers"],
    )
    with S3Publication(S3Artifacts(case.source)) as publication:
        publication.put_folder(folder)
    shutil.rmtree(folder)
