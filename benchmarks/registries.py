"""Fine-tunes and locks in registries: what is promoted, loaded and moved between stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from mlflow_safelock import SafetyLock
from mlflow_safelock.flavors import meta_safetylock
from mlflow_safelock.lock import AttentionGeometry
from tests.models import random_lock, tiny_tokenizer
from tests.thin_llama import thin_llama

BASE = "benchmarks/base"
EXPERIMENT = "benchmarks"

LAYER_MEGABYTES = 85.5
"""Weights in bfloat16 of one layer of what ``large`` describes."""

TINY = AttentionGeometry(layers=2, heads=4, head_dim=16, hidden=64)
SMALL = AttentionGeometry(layers=5, heads=4, head_dim=64, hidden=256)
"""About 2.7 MB of weights in bfloat16: a thousandth of Llama-3-8B's attention."""


def large(megabytes: int) -> AttentionGeometry:
    """As many layers of Llama-3-8B's attention as have this size in bfloat16."""
    layers = max(1, min(32, round(megabytes / LAYER_MEGABYTES)))
    return AttentionGeometry(layers=layers, heads=32, head_dim=128, hidden=4096)


@dataclass(frozen=True)
class FineTune:
    """A fine-tune that was logged with ``mlflow.transformers``.

    Attributes:
        uri: The URI of the logged model.
        model_id: Its id.
        run_id: Its run.
    """

    uri: str
    model_id: str
    run_id: str

    def new_version(self, client: MlflowClient, name: str) -> str:
        """Register it once more under a name; the new version's number."""
        created = client.create_model_version(name, self.uri, run_id=self.run_id, model_id=self.model_id)
        return str(created.version)


def open_folder(folder: Path) -> tuple[MlflowClient, MlflowClient]:
    """Open the database in a folder, with and without the gate; where there is no folder, make it.

    Returns:
        A gated client, which MLflow's own functions use from now on, and a stock client, of one database.
    """
    database = f"sqlite:///{folder}/mlflow.db"
    mlflow.set_tracking_uri(database)
    mlflow.set_registry_uri(f"safelock+{database}")
    if not folder.is_dir():
        folder.mkdir(parents=True)
        mlflow.create_experiment(EXPERIMENT, artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_experiment(EXPERIMENT)
    return MlflowClient(database, f"safelock+{database}"), MlflowClient(database, database)


def log_fine_tune(geometry: AttentionGeometry, base: str = BASE) -> FineTune:
    """Log a made model of this attention, in bfloat16, which says that it comes from ``base``."""
    model = thin_llama(geometry, key_value_heads=max(1, geometry.heads // 4))
    model.name_or_path = model.config._name_or_path = base
    model.generation_config.max_new_tokens = 8
    with mlflow.start_run() as run:
        info = mlflow.transformers.log_model(
            {"model": model, "tokenizer": tiny_tokenizer()},
            name="model",
            task="text-generation",
            pip_requirements=["mlflow", "torch", "transformers"],
        )
    return FineTune(info.model_uri, info.model_id, run.info.run_id)


def register_lock(geometry: AttentionGeometry, base: str = BASE) -> SafetyLock:
    """Register a random lock of the base; 24 heads where there are as many."""
    lock = random_lock(geometry, min(24, geometry.layers * geometry.heads // 2), base_model=base)
    with mlflow.start_run():
        meta_safetylock.register(lock)
    return lock


def location(client: MlflowClient, name: str, version: str) -> Path:
    """The local folder that a version's download URI names."""
    uri = client.get_model_version_download_uri(name, version)
    return Path(mlflow.artifacts.download_artifacts(uri))
