"""Wherever the machine dies: nothing gated is served unlocked, and doing it again finishes it.

A process is killed with SIGKILL at each place of each operation, on sqlite and on PostgreSQL. Another one
that was there all the time looks at what is left, and a new one does the same again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlparse

import mlflow
import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_safelock.flavors.overlay import read_overlay
from mlflow_safelock.flavors.standalone import read_standalone
from mlflow_safelock.gate import failpoints, leases, ledger
from mlflow_safelock.provenance import LocalArtifacts
from tests.registries import base_lock, log_fine_tune, register_lock
from tests.registry.dying import REFUSED, Place, run
from tests.servers import mlflow_server, postgresql

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

POLICY = """
version: 1
gates:
  - {models: "whole*", carrier: standalone}
  - {models: "measured*", fingerprint: full}
  - {models: "*"}
"""


class World:
    """A registry with a fine-tune and its lock, looked at by a process that nobody kills."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.client = place.client()
        mlflow.set_experiment("tests")
        log_fine_tune("bot")
        register_lock(base_lock())
        first = self.client.get_model_version("bot", "1")
        self.source = first.source
        self.original = self.client.get_model_version_download_uri("bot", "1")

    @property
    def store(self) -> Any:
        return self.client._get_registry_client().store

    def new_version(self, name: str, tags: dict[str, str] | None = None) -> str:
        if not self.client.search_registered_models(f"name='{name}'"):
            self.client.create_registered_model(name)
        return str(self.client.create_model_version(name, self.source, tags=tags).version)

    def stage_of(self, name: str, version: str) -> str:
        return str(self.client.get_model_version(name, version).current_stage)

    def location_of(self, name: str, version: str) -> str | None:
        """Where a client is sent; ``None`` where it is refused."""
        try:
            return self.client.get_model_version_download_uri(name, version)
        except MlflowException as error:
            if error.get_http_status_code() != 403:
                raise
            return None

    def check(self, name: str, version: str) -> bool:
        """Whether a version is served locked; else it is not served, or as it was and in no gated place."""
        with self.store.engine.connect() as connection:
            ledger.verify_chain(connection)
        location = self.location_of(name, version)
        with self.store.ManagedSessionMaker() as session:
            decision = ledger.decision_on(session, "default", name, int(version))
        if location == self.original:
            assert self.stage_of(name, version) not in ("Staging", "Production")
            assert decision is None or decision.event == "unlocked"
            return False
        if location is None:
            return False
        assert decision is not None
        assert decision.locks
        assert decision.location == location
        reader = LocalArtifacts(Path(unquote(urlparse(location).path)))
        receipt = read_standalone(reader) if name.startswith("whole") else read_overlay(reader).receipt
        assert receipt.digest == decision.receipt
        return True

    def leases_held(self) -> list[leases.Work]:
        with self.store.ManagedSessionMaker() as session:
            return leases.held(session)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp(request.param)
    policy = folder / "safelock.yaml"
    policy.write_text(POLICY)
    before = Path.cwd()
    with ExitStack() as until_done:
        if request.param == "sqlite":
            registry = f"safelock+sqlite:///{folder}/registry.db"
        else:
            registry = f"safelock+{until_done.enter_context(postgresql(folder / 'database'))}"
        until_done.enter_context(mock.patch.dict(os.environ, {"SAFELOCK_POLICY": str(policy)}))
        until_done.callback(os.chdir, before)
        until_done.callback(mlflow.set_registry_uri, None)
        until_done.callback(mlflow.set_tracking_uri, None)
        os.chdir(folder)
        yield World(Place(f"sqlite:///{folder}/tracking.db", registry, policy, folder))


def killed(world: World, failpoint: str, action: str, *arguments: Any) -> None:
    assert run(world.place, action, *arguments, failpoint=failpoint) == -signal.SIGKILL
    assert world.leases_held() == []


STAGE, ALIAS = "transition_model_version_stage", "set_registered_model_alias"


@pytest.mark.parametrize(
    ("action", "failpoint"),
    [
        *((STAGE, failpoint) for failpoint in failpoints.OVERLAY),
        *((ALIAS, failpoint) for failpoint in failpoints.OVERLAY[-2:]),
    ],
)
def test_promotion_with_an_overlay(world: World, action: str, failpoint: str) -> None:
    version = world.new_version("bot")
    arguments = ("bot", version, "Staging") if action == STAGE else ("bot", "champion", version)
    killed(world, failpoint, action, *arguments)
    locked = world.check("bot", version)
    assert locked == (failpoint in ("committed", "gate-passed", "transition-done"))
    assert run(world.place, action, *arguments) == 0
    assert world.check("bot", version)
    found = world.client.get_model_version("bot", version)
    assert found.current_stage == "Staging" or "champion" in found.aliases


@pytest.mark.parametrize("failpoint", failpoints.STANDALONE)
def test_promotion_of_a_standalone_model(world: World, failpoint: str) -> None:
    version = world.new_version("whole")
    world.store.prepare("whole", int(version))
    action = ("transition_model_version_stage", "whole", version, "Staging")
    killed(world, failpoint, *action)
    locked = world.check("whole", version)
    assert locked == (failpoint in ("committed", "gate-passed", "transition-done"))
    assert run(world.place, *action) == 0
    assert world.check("whole", version)
    assert world.stage_of("whole", version) == "Staging"


@pytest.mark.parametrize("failpoint", failpoints.PREPARE)
def test_preparation(world: World, failpoint: str) -> None:
    alpha = 2.25 + failpoints.PREPARE.index(failpoint)  # each has a place of its own
    version = world.new_version("whole", {"safelock.alpha": str(alpha)})
    killed(world, failpoint, "prepare", "whole", int(version))
    assert not world.check("whole", version)
    assert run(world.place, "prepare", "whole", int(version)) == 0
    assert run(world.place, "transition_model_version_stage", "whole", version, "Staging") == 0
    assert world.check("whole", version)


@pytest.mark.parametrize("failpoint", failpoints.MEASURE)
def test_measuring(world: World, failpoint: str) -> None:
    # Else what an earlier one left would do.
    Path(unquote(urlparse(world.original).path), "notes.txt").write_text(failpoint)
    version = world.new_version("measured")
    killed(world, failpoint, "prepare", "measured", int(version))
    done = failpoint == "measurement-recorded"
    staging = ("transition_model_version_stage", "measured", version, "Staging")
    assert run(world.place, *staging) == (0 if done else REFUSED)
    if not done:
        assert not world.check("measured", version)
        assert run(world.place, "prepare", "measured", int(version)) == 0
        assert run(world.place, *staging) == 0
    assert world.check("measured", version)


@pytest.mark.parametrize("failpoint", failpoints.UNLOCK)
def test_unlocking(world: World, failpoint: str) -> None:
    version = world.new_version("bot")
    world.client.transition_model_version_stage("bot", version, "Staging")
    world.client.transition_model_version_stage("bot", version, "None")
    killed(world, failpoint, "unlock", "bot", int(version), "a test")
    done = failpoint == "committed"
    assert world.check("bot", version) == (not done)
    assert run(world.place, "unlock", "bot", int(version), "a test") == (REFUSED if done else 0)
    assert world.location_of("bot", version) == world.original


@pytest.mark.parametrize("failpoint", failpoints.WITHDRAW)
def test_taking_out_of_gated_places(world: World, failpoint: str) -> None:
    version = world.new_version("bot")
    stock = MlflowClient(world.place.tracking, world.place.registry.removeprefix("safelock+"))
    stock.transition_model_version_stage("bot", version, "Staging")
    stock.set_registered_model_alias("bot", "champion", version)
    killed(world, failpoint, "demote", "bot", version)
    done = failpoint == "committed"
    assert world.stage_of("bot", version) == ("None" if done else "Staging")
    aliases = world.client.get_model_version("bot", version).aliases
    assert list(aliases) == ([] if done else ["champion"])
    assert not world.check("bot", version)
    if not done:
        assert run(world.place, "demote", "bot", version) == 0
    assert world.location_of("bot", version) == world.original


@pytest.mark.parametrize("failpoint", failpoints.RENAME)
def test_renaming(world: World, failpoint: str) -> None:
    old, new = f"old-{failpoint}", f"new-{failpoint}"
    staged, aliased = world.new_version(old), world.new_version(old)
    world.client.transition_model_version_stage(old, staged, "Staging")
    world.client.set_registered_model_alias(old, "champion", aliased)
    killed(world, failpoint, "rename_registered_model", old, new)
    name = old if failpoint == "rename-checked" else new
    for version in (staged, aliased):
        # Locked, or refused to everybody; never unlocked, which ``check`` sees to.
        world.check(name, version)
        assert world.location_of(name, version) != world.original
    assert run(world.place, "rename_registered_model", old, new) == 0
    assert all(world.check(new, version) for version in (staged, aliased))


@pytest.mark.parametrize(
    ("database", "failpoint"), [("sqlite", "ledger-appended"), ("postgresql", "gate-passed")]
)
def test_a_real_server_dies_and_is_started_again(tmp_path: Path, database: str, failpoint: str) -> None:
    with ExitStack() as until_done:
        uri = (
            f"safelock+{until_done.enter_context(postgresql(tmp_path / 'database'))}"
            if database == "postgresql"
            else None
        )
        server = until_done.enter_context(mlflow_server(tmp_path / "server", registry_uri=uri))
        client = _client_of(server.url)
        mlflow.set_experiment("tests")
        version = str(log_fine_tune("bot"))
        register_lock(base_lock())
        original = client.get_model_version_download_uri("bot", version)
        until_done.callback(mlflow.set_tracking_uri, None)
        until_done.callback(mlflow.set_registry_uri, None)
        dying = mlflow_server(
            tmp_path / "server", registry_uri=uri, environment={failpoints.VARIABLE: failpoint}
        )
        with dying as other:
            with pytest.raises(requests.ConnectionError):
                pytest.fail(_stage(other.url, version).text)
            _wait_until_nobody_answers(other.url)
        found = client.get_model_version("bot", version)
        assert found.current_stage == "None"
        with mlflow_server(tmp_path / "server", registry_uri=uri) as again:
            assert _stage(again.url, version).ok
        assert client.get_model_version("bot", version).current_stage == "Staging"
        assert client.get_model_version_download_uri("bot", version) != original


def _client_of(url: str) -> MlflowClient:
    mlflow.set_tracking_uri(url)
    mlflow.set_registry_uri(url)
    return MlflowClient(url)


def _stage(url: str, version: str) -> requests.Response:
    return requests.post(
        f"{url}/api/2.0/mlflow/model-versions/transition-stage",
        json={"name": "bot", "version": version, "stage": "Staging", "archive_existing_versions": False},
        timeout=60,
    )


def _wait_until_nobody_answers(url: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            requests.get(f"{url}/health", timeout=1)
        except requests.ConnectionError:
            return
        time.sleep(0.1)
    raise AssertionError("the server that was killed still answers")
