"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from tests.sigstore_instance import SigstoreInstance
    from tests.toy import Toy

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

SHARED = Path(__file__).resolve().parents[2] / "shared"


LONG = (
    "registry/test_stateful.py",
    "registry/test_failpoints.py",
    "test_benchmarks.py",
    "registry/test_server.py",
)
"""Files whose tests take minutes: they come first, so that at the end no process waits for another."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    folder = Path(__file__).parent
    order = {folder / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"the reference data is not at {SHARED}: tests against it are skipped")
    return SHARED


@pytest.fixture(scope="session")
def toy() -> Toy:
    """The demo's toy, which takes ten seconds to train."""
    from tests.toy import make_toy

    return make_toy()


@pytest.fixture
def sigstore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SigstoreInstance]:
    """A Sigstore instance of our own, which the settings name; nobody is logged in."""
    from tests.sigstore_instance import running_instance

    with running_instance(tmp_path / "sigstore") as instance:
        monkeypatch.setenv("SAFELOCK_SIGSTORE_TRUST_CONFIG", str(instance.trust_config))
        monkeypatch.setenv("SAFELOCK_SIGSTORE_TOKEN_FILE", str(instance.token_file))
        yield instance


def _uris(folder: Path) -> tuple[str, str]:
    return f"sqlite:///{folder}/tracking.db", f"safelock+sqlite:///{folder}/registry.db"


@pytest.fixture(scope="session")
def empty_databases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MLflow's two databases as they are when new; making them takes MLflow seconds."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("databases")
    client = MlflowClient(*_uris(folder))
    client.search_experiments()
    client.search_registered_models()
    return folder


@pytest.fixture
def client(tmp_path: Path, empty_databases: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    """A client of a gated sqlite registry, with local artifacts below ``tmp_path``."""
    import mlflow
    from mlflow import MlflowClient

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
