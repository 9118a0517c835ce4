"""A gated registry in this process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient


def _uris(folder: Path) -> tuple[str, str]:
    return f"sqlite:///{folder}/tracking.db", f"safelock+sqlite:///{folder}/registry.db"


@pytest.fixture(scope="session")
def empty_databases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MLflow's two databases as they are when new; making them takes MLflow seconds."""
    folder = tmp_path_factory.mktemp("databases")
    client = MlflowClient(*_uris(folder))
    client.search_experiments()
    client.search_registered_models()
    return folder


@pytest.fixture
def client(
    tmp_path: Path, empty_databases: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MlflowClient]:
    """A client of a gated sqlite registry, with local artifacts below ``tmp_path``."""
    for database in empty_databases.glob("*.db"):
        shutil.copy(database, tmp_path)
    monkeypatch.delenv("SAFELOCK_POLICY", raising=False)
    monkeypatch.chdir(tmp_path)
    tracking, registry = _uris(tmp_path)
    mlflow.set_tracking_uri(tracking)
    mlflow.set_registry_uri(registry)
    mlflow.set_experiment("tests")
    yield MlflowClient(tracking, registry)
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)
