"""A stage transition over REST, at a gated server and at a stock one beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import mlflow
import requests
from mlflow import MlflowClient

from benchmarks.harness import Contender, Settings, compare
from benchmarks.registries import EXPERIMENT, TINY, FineTune, log_fine_tune, register_lock
from benchmarks.results import Row
from tests.servers import MlflowServer, mlflow_server

NAME = "bot"


def run(settings: Settings) -> Iterator[Row]:
    """Transitions that the gate lets pass, locks, and finds done already."""
    with ExitStack() as stack:
        stack.callback(mlflow.set_tracking_uri, None)
        folders = {scheme: settings.scratch / f"server-{scheme}" for scheme in ("safelock+sqlite", "sqlite")}
        servers = [
            mlflow_server(folder, registry_uri=f"{scheme}:///{folder}/tracking.db")
            for scheme, folder in folders.items()
        ]
        with ThreadPoolExecutor(len(servers)) as pool:  # they take their time to start
            gated, stock = pool.map(stack.enter_context, servers)
        yield from _compare(fill(stack, gated), fill(stack, stock), settings)


def _compare(gated: ServedRegistry, stock: ServedRegistry, settings: Settings) -> Iterator[Row]:
    few, many = settings.repetitions(40), settings.repetitions(150)
    beginning = gated.ask()
    yield compare(
        "transition",
        "not gated: Archived and back",
        ours=Contender("safelock+sqlite", gated.back_and_forth()),
        theirs=Contender("sqlite", stock.back_and_forth()),
        limit=beginning,
        repetitions=many,
    )
    yield compare(
        "transition",
        "first promotion: Staging, locks",
        ours=Contender("safelock+sqlite", gated.promotions(few + 1)),
        theirs=Contender("sqlite, locks nothing", stock.promotions(few + 1)),
        limit=beginning,
        repetitions=few,
    )
    gated.check_locked()
    yield compare(
        "transition",
        "locked already: Staging once more",
        ours=Contender("safelock+sqlite", gated.again()),
        theirs=Contender("sqlite", stock.again()),
        limit=beginning,
        repetitions=many,
    )


def fill(stack: ExitStack, server: MlflowServer) -> ServedRegistry:
    """Register a lock at a server, and log a fine-tune that it is for."""
    mlflow.set_tracking_uri(server.url)
    mlflow.set_registry_uri(server.url)
    mlflow.set_experiment(EXPERIMENT)
    register_lock(TINY)
    client = MlflowClient(server.url)
    client.create_registered_model(NAME)
    return ServedRegistry(server, stack.enter_context(requests.Session()), client, log_fine_tune(TINY))


@dataclass(frozen=True)
class ServedRegistry:
    """A server with a fine-tune in it, and a connection to it."""

    server: MlflowServer
    session: requests.Session
    client: MlflowClient
    fine_tune: FineTune

    def new_version(self) -> str:
        """Register the fine-tune once more; the version's number."""
        return self.fine_tune.new_version(self.client, NAME)

    def back_and_forth(self) -> Callable[[], None]:
        """Transitions of one version between two stages that are not gated."""
        version, stages = self.new_version(), cycle(["Archived", "None"])
        return lambda: self.transition(version, next(stages))

    def promotions(self, number: int) -> Callable[[], None]:
        """Transitions to Staging, each of another version."""
        versions = iter([self.new_version() for _ in range(number)])
        return lambda: self.transition(next(versions), "Staging")

    def again(self) -> Callable[[], None]:
        """Transitions to Staging of a version that is there already."""
        version = self.new_version()
        self.transition(version, "Staging")
        return lambda: self.transition(version, "Staging")

    def ask(self) -> Contender:
        """A request that the server answers without doing anything."""
        return Contender("a request that does nothing: GET /version", self.ask_for_the_version)

    def check_locked(self) -> None:
        """Raise unless every promoted version was redirected to a locked model."""
        for version in self.client.search_model_versions(f"name='{NAME}'"):
            uri = self.client.get_model_version_download_uri(NAME, version.version)
            if (version.current_stage == "Staging") != ("-safelock/" in uri):
                raise AssertionError(f"Version {version.version} is {version.current_stage}, at {uri}.")

    def ask_for_the_version(self, session: requests.Session | None = None) -> None:
        """A request that the server answers without doing anything."""
        (session or self.session).get(f"{self.server.url}/version", timeout=60).raise_for_status()

    def transition(self, version: str, stage: str, session: requests.Session | None = None) -> None:
        """A transition, over the registry's own connection or another one."""
        body: dict[str, Any] = {
            "name": NAME,
            "version": version,
            "stage": stage,
            "archive_existing_versions": False,
        }
        url = f"{self.server.url}/api/2.0/mlflow/model-versions/transition-stage"
        (session or self.session).post(url, json=body, timeout=120).raise_for_status()
