"""Promoting a fine-tune whose artifacts are on S3: moto's server, in a process of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from benchmarks import s3_standalone
from benchmarks.harness import Contender, Settings, compare
from benchmarks.registries import (
    BASE,
    SMALL,
    TINY,
    FineTune,
    large,
    log_fine_tune,
    open_folder,
    register_lock,
)
from benchmarks.results import Row
from benchmarks.s3_traffic import Traffic
from mlflow_safelock.flavors.overlay import read_overlay
from mlflow_safelock.lock import AttentionGeometry
from mlflow_safelock.provenance import FileFingerprint
from mlflow_safelock.registry.s3 import S3Artifacts, s3_client

BUCKET = "benchmarks"
START_SECONDS = 60


def run(settings: Settings) -> Iterator[Row]:
    """Overlays, of a large model against a small one and against reading it whole; a standalone model."""
    with _s3_server(settings.scratch / "s3.log"):
        s3_client().create_bucket(Bucket=BUCKET)
        gated, stock = open_folder(settings.scratch / "s3-registry")
        experiment = mlflow.create_experiment("s3", artifact_location=f"s3://{BUCKET}/mlflow")
        mlflow.set_experiment(experiment_id=experiment)
        small = _log(gated, stock, "s3-small", TINY if settings.quick else SMALL)
        big = _log(gated, stock, "s3-large", SMALL if settings.quick else large(settings.megabytes))
        repetitions = settings.repetitions(11)
        case = f"{big.size / 1e6:.3g} MB of weights on S3"
        figures = {
            "times as many bytes": big.size / small.size,
            "kB read": big.traffic.received / 1e3,
            "kB read of the small one": small.traffic.received / 1e3,
            "requests": float(big.traffic.requests),
            "requests for the small one": float(small.traffic.requests),
        }
        yield compare(
            "s3",
            f"{case}, beside {small.size / 1e6:.2g} MB",
            ours=big.by_overlay(repetitions),
            theirs=small.by_overlay(repetitions),
            limit=big.least(repetitions),
            repetitions=repetitions,
            figures=figures,
        )
        yield compare(
            "s3",
            case,
            ours=big.by_overlay(repetitions),
            theirs=big.by_download(settings.scratch / "downloaded"),
            limit=big.least(repetitions),
            repetitions=repetitions,
            figures=figures,
        )
        yield s3_standalone.measure(settings, BUCKET)


@dataclass(frozen=True)
class _OnS3:
    """A fine-tune on S3 with a lock, of which one version was promoted.

    Attributes:
        gated: A client whose transitions lock.
        stock: A client whose transitions do not.
        fine_tune: The fine-tune.
        name: The registered model that the gated client promotes versions of.
        source: Where the fine-tune is.
        fingerprint: What the promotion read of it for its fingerprint.
        traffic: What passed through the client during the promotion.
    """

    gated: MlflowClient
    stock: MlflowClient
    fine_tune: FineTune
    name: str
    source: str
    fingerprint: tuple[FileFingerprint, ...]
    traffic: Traffic

    @property
    def size(self) -> int:
        """Bytes of the fine-tune's weights."""
        return sum(file.size for file in self.fingerprint if file.path.endswith(".safetensors"))

    def by_overlay(self, repetitions: int) -> Contender:
        """The whole transition through the gate; each of a version that was not promoted yet."""
        versions = self._versions(self.gated, self.name, repetitions)
        return Contender(
            f"transition with the gate: overlay of {self.size / 1e6:.3g} MB",
            lambda: self.gated.transition_model_version_stage(self.name, next(versions), "Staging"),
        )

    def by_download(self, folder: Path) -> Contender:
        """What a promotion does first that reads the whole model."""
        return Contender(
            "mlflow.artifacts.download_artifacts, and no more",
            lambda: mlflow.artifacts.download_artifacts(self.source, dst_path=str(folder)),
            lambda _: shutil.rmtree(folder),
        )

    def least(self, repetitions: int) -> Contender:
        """What a promotion by overlay cannot do without."""
        name = f"{self.name}-stock"
        versions = self._versions(self.stock, name, repetitions)

        def do() -> None:
            reader = S3Artifacts(self.source)
            for file in self.fingerprint:
                reader.read_many(file.path, file.spans)
            self.stock.transition_model_version_stage(name, next(versions), "Staging")

        return Contender("read what the fingerprint reads, file by file; a stock transition", do)

    def _versions(self, client: MlflowClient, name: str, repetitions: int) -> Iterator[str]:
        """New versions; one more than the repetitions, since the first does not count."""
        return iter([self.fine_tune.new_version(client, name) for _ in range(repetitions + 1)])


def _log(gated: MlflowClient, stock: MlflowClient, name: str, geometry: AttentionGeometry) -> _OnS3:
    """Log a fine-tune and its lock to S3, and promote a version of it through the gate."""
    base = f"{BASE}-{name}"
    register_lock(geometry, base)
    fine_tune = log_fine_tune(geometry, base)
    for registered in (name, f"{name}-stock"):
        gated.create_registered_model(registered)
    version = fine_tune.new_version(gated, name)
    source = gated.get_model_version_download_uri(name, version)
    traffic = Traffic()
    with traffic.counted():
        gated.transition_model_version_stage(name, version, "Staging")
    overlay = S3Artifacts(gated.get_model_version_download_uri(name, version))
    fingerprint = read_overlay(overlay).receipt.predicate.source.fingerprint.files
    return _OnS3(gated, stock, fine_tune, name, source, fingerprint, traffic)


@contextmanager
def _s3_server(log: Path) -> Iterator[None]:
    """Run moto's server, and let MLflow and boto3 in this process use it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    before = {name: os.environ.get(name) for name in settings}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    os.environ.update(settings)
    try:
        _wait(process, port, log)
        yield
    finally:
        process.terminate()
        process.wait(timeout=20)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until the server takes connections."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"moto's server did not start:\n{log.read_text()[-2000:]}")
