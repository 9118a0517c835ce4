"""Thirty-two clients at once, at two servers of two workers each, on one PostgreSQL."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
import sqlalchemy as sa
from mlflow import MlflowClient

from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from mlflow_safelock.flavors.overlay import RECEIPT_FILE
from mlflow_safelock.gate import ledger
from mlflow_safelock.gate.ledger import LedgerEntry, verify_chain
from mlflow_safelock.provenance import LocalArtifacts, Receipt
from tests.registries import base_lock, fine_tune, log_fine_tune, register_lock
from tests.servers import mlflow_server, postgresql

CLIENTS = 32
ANSWERS_WITHIN = 90.0
"""Seconds. Thirty-two promotions one after the other take a few; who waits for a deadlock waits longer."""

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")


@dataclass(frozen=True)
class Servers:
    """Two servers on one database."""

    urls: tuple[str, ...]
    engine: sa.Engine
    client: MlflowClient

    def post(self, number: int, path: str, body: dict[str, Any]) -> requests.Response:
        """One client's request, at one of the two."""
        url = f"{self.urls[number % len(self.urls)]}/api/2.0/mlflow/{path}"
        return requests.post(url, json=body, timeout=ANSWERS_WITHIN)

    def events(self, name: str) -> list[dict[str, Any]]:
        """What the ledger says of a model, in order."""
        query = sa.text("SELECT body FROM safelock_ledger ORDER BY sequence")
        with self.engine.connect() as connection:
            rows = [json.loads(body) for (body,) in connection.execute(query)]
        return [row for row in rows if row.get("model") == name]

    def location(self, name: str, version: str) -> Path:
        """Where a version is served from."""
        return Path(self.client.get_model_version_download_uri(name, version).removeprefix("file://"))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("concurrent")
    arguments = ("--no-serve-artifacts", "--default-artifact-root", str(folder / "root"))
    with ExitStack() as until_done:
        uri = until_done.enter_context(postgresql(folder / "database"))
        # MLflow makes its tables by itself; two servers that do so at once are in each other's way.
        MlflowClient(registry_uri=uri).search_registered_models()
        starting = [
            mlflow_server(folder / name, registry_uri=f"safelock+{uri}", workers=2, arguments=arguments)
            for name in ("one", "two")
        ]
        with ThreadPoolExecutor(len(starting)) as pool:  # they take their time to start
            running = list(pool.map(until_done.enter_context, starting))
        until_done.callback(mlflow.set_tracking_uri, None)
        mlflow.set_tracking_uri(running[0].url)
        mlflow.set_registry_uri(running[0].url)
        mlflow.set_experiment("at once")
        register_lock(base_lock())
        engine = sa.create_engine(uri)
        until_done.callback(engine.dispose)
        yield Servers(tuple(server.url for server in running), engine, MlflowClient(running[0].url))


def at_once(requests_of: Sequence[Any]) -> list[requests.Response]:
    """Send requests that were made ready, all at the same moment."""
    ready = threading.Barrier(len(requests_of))

    def send(request: Any) -> requests.Response:
        ready.wait(timeout=60)
        answer: requests.Response = request()
        return answer

    with ThreadPoolExecutor(len(requests_of)) as pool:
        return list(pool.map(send, requests_of))


def transition(name: str, version: str, **more: Any) -> dict[str, Any]:
    body = {"name": name, "version": version, "stage": "Staging", "archive_existing_versions": False}
    return body | more


def check_in_force(servers: Servers, name: str, version: str) -> dict[str, Any]:
    """The version is served locked, as its newest row in the ledger says; that row."""
    promoted = [
        row for row in servers.events(name) if row["event"] == "promoted" and str(row["version"]) == version
    ]
    served = servers.location(name, version)
    assert str(served) == promoted[-1]["location"].removeprefix("file://")
    receipt = Receipt.parse(LocalArtifacts(served).read(RECEIPT_FILE), origin=str(served))
    assert receipt.digest == promoted[-1]["receipt"]
    assert receipt.predicate.alpha == promoted[-1]["alpha"]
    return promoted[-1]


def test_the_same_promotion_by_everybody_is_made_once(servers: Servers) -> None:
    version = str(log_fine_tune("same"))
    path = "model-versions/transition-stage"
    answers = at_once(
        [
            lambda number=number: servers.post(number, path, transition("same", version))
            for number in range(CLIENTS)
        ]
    )
    assert {answer.status_code for answer in answers} == {200}
    assert len([row for row in servers.events("same") if row["event"] == "promoted"]) == 1
    check_in_force(servers, "same", version)
    verify_chain_of(servers)


def test_everybody_promotes_a_version_of_their_own_and_one_of_them_stays(servers: Servers) -> None:
    versions = [str(log_fine_tune("own"))]
    first = servers.client.get_model_version("own", versions[0])
    versions += [
        str(
            servers.client.create_model_version(
                "own", first.source, model_id=first.source.removeprefix("models:/")
            ).version
        )
        for _ in range(CLIENTS - 1)
    ]
    path, more = "model-versions/transition-stage", {"archive_existing_versions": True}
    began = time.monotonic()
    answers = at_once(
        [
            lambda number=number, version=version: servers.post(
                number, path, transition("own", version, **more)
            )
            for number, version in enumerate(versions)
        ]
    )
    print(f"{CLIENTS} versions in {time.monotonic() - began:.2f} s")
    check_answers(answers)
    staged = [
        found.version
        for found in servers.client.search_model_versions("name='own'")
        if found.current_stage == "Staging"
    ]
    assert staged
    for version in staged:
        check_in_force(servers, "own", version)
    verify_chain_of(servers)


def test_of_conflicting_strengths_one_wins_and_is_what_is_served(servers: Servers) -> None:
    version = str(log_fine_tune("alphas"))
    alphas = [4.0 + number / 8 for number in range(CLIENTS)]

    def ask(number: int, alpha: float) -> requests.Response:
        tag = {"name": "alphas", "version": version, "key": "safelock.alpha", "value": str(alpha)}
        servers.post(number, "model-versions/set-tag", tag)
        return servers.post(number, "model-versions/transition-stage", transition("alphas", version))

    answers = at_once([lambda number=number, a=alpha: ask(number, a) for number, alpha in enumerate(alphas)])
    check_answers(answers)
    assert any(answer.ok for answer in answers)
    winner = check_in_force(servers, "alphas", version)
    assert winner["alpha"] in alphas
    verify_chain_of(servers)


def test_an_alias_that_everybody_wants_for_another_version_is_on_a_locked_one(servers: Servers) -> None:
    versions = [str(log_fine_tune("aliased")), str(log_fine_tune("aliased"))]

    def ask(number: int) -> requests.Response:
        body = {"name": "aliased", "alias": "champion", "version": versions[number // 2 % 2]}
        return servers.post(number, "registered-models/alias", body)

    check_answers(at_once([lambda number=number: ask(number) for number in range(CLIENTS)]))
    holder = servers.client.get_model_version_by_alias("aliased", "champion").version
    check_in_force(servers, "aliased", str(holder))
    verify_chain_of(servers)


def test_a_revocation_that_a_promotion_waits_for_counts(servers: Servers) -> None:
    base = "org/revoked-base"
    version = str(log_fine_tune("waiting", fine_tune(base=base)))
    lock = base_lock(base=base)
    register_lock(lock)
    known = next(row for row in servers.events(lock_model_name(base)) if row["event"] == "registered")
    entry = LedgerEntry.model_validate_json(json.dumps(known | {"event": "revoked", "message": "leaked"}))
    with ThreadPoolExecutor(1) as pool, servers.engine.connect() as revoking:
        ledger.append(revoking, entry)  # its row has the next number, for which the promotion waits
        path = "model-versions/transition-stage"
        answer = pool.submit(servers.post, 0, path, transition("waiting", version))
        wait_for_a_lock(servers.engine)
        revoking.commit()
    assert answer.result().status_code == 403
    assert re.search(r"\[lock_revoked\].*while it was being applied: leaked", answer.result().text)
    assert servers.client.get_model_version("waiting", version).current_stage == "None"
    assert [row["event"] for row in servers.events("waiting")] == ["rejected"]
    verify_chain_of(servers)


def wait_for_a_lock(engine: sa.Engine) -> None:
    """Wait until somebody waits for somebody else's transaction."""
    waiting = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    deadline = time.monotonic() + ANSWERS_WITHIN
    while time.monotonic() < deadline:
        with engine.connect() as connection:
            if connection.execute(waiting).scalar_one():
                return
        time.sleep(0.05)
    pytest.fail("nobody waited")


def check_answers(answers: Sequence[requests.Response]) -> None:
    """Everybody was answered: it was done, or somebody else was first."""
    for answer in answers:
        lost = answer.status_code == 409 and answer.json()["error_code"] == "RESOURCE_CONFLICT"
        assert answer.ok or lost, answer.text


def verify_chain_of(servers: Servers) -> None:
    with servers.engine.connect() as connection:
        verify_chain(connection)
