"""Promotions by one client and by many at once, at a gated server and at a stock one, each on PostgreSQL.

Each request has a connection of its own: uvicorn with several workers does not set ``TCP_NODELAY``, so that
on a kept connection any answer, a stock server's too, may wait 40 ms for a delayed acknowledgement.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import mlflow
import requests
from mlflow import MlflowClient

from benchmarks.harness import Settings
from benchmarks.results import Limit, Ratio, Row, Timing
from benchmarks.transition import ServedRegistry, fill
from tests.servers import mlflow_server, postgresql

CLIENTS = 32
WORKERS = 2
"""Workers of each server."""

Promise = Callable[[requests.Session], None]
"""One client's request, over its own connection."""


def run(settings: Settings) -> Iterator[Row]:
    """First promotions to Staging, each of a version of its own; every figure is of one client's request."""
    with ExitStack() as stack:
        stack.callback(mlflow.set_tracking_uri, None)
        places = {
            "safelock+": settings.scratch / "concurrency-gated",
            "": settings.scratch / "concurrency-stock",
        }
        databases = {
            scheme: stack.enter_context(postgresql(folder / "database")) for scheme, folder in places.items()
        }
        for uri in databases.values():
            # MLflow makes its tables by itself; workers that do so at once are in each other's way.
            MlflowClient(registry_uri=uri).search_registered_models()
        workers = 1 if settings.quick else WORKERS
        servers = [
            mlflow_server(folder, registry_uri=f"{scheme}{databases[scheme]}", workers=workers)
            for scheme, folder in places.items()
        ]
        with ThreadPoolExecutor(len(servers)) as pool:  # they take their time to start
            running = list(pool.map(stack.enter_context, servers))
        gated, stock = (fill(stack, server) for server in running)
        yield _row(gated, stock, 1, rounds=settings.repetitions(60))
        many = 4 if settings.quick else CLIENTS
        yield _row(gated, stock, many, rounds=settings.repetitions(6))
        gated.check_locked()


def _row(gated: ServedRegistry, stock: ServedRegistry, clients: int, rounds: int) -> Row:
    """Rounds in turns, of which the first does not count: all clients ask at the same moment."""
    own: list[float] = []
    other: list[float] = []
    least: list[float] = []
    whole: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds + 1):
        turns: dict[str, list[Promise]] = {
            "ours": _promotions(gated, clients),
            "theirs": _promotions(stock, clients),
            "limit": [gated.ask_for_the_version for _ in range(clients)],
        }
        names = list(turns) if number % 2 else list(reversed(turns))
        found = {name: _at_once(turns[name]) for name in names}
        if number == 0:
            continue
        # The quickest beside the quickest, and so on.
        own += sorted(found["ours"])
        other += sorted(found["theirs"])
        least += sorted(found["limit"])
        for name, seconds in whole.items():
            seconds.append(max(found[name]))
    return Row(
        benchmark="concurrency",
        case=f"first promotion: Staging, by {clients} client{'s' if clients > 1 else ''} at once",
        ours=Timing.of("safelock+postgresql", own),
        theirs=Timing.of("postgresql, locks nothing", other),
        ratio=Ratio.of(own, other),
        limit=Limit.of("a request that does nothing: GET /version", least, own),
        figures={
            f"seconds until all of {name} are answered, median": sorted(seconds)[len(seconds) // 2]
            for name, seconds in whole.items()
        },
    )


def _promotions(registry: ServedRegistry, clients: int) -> list[Promise]:
    def promotion(version: str) -> Promise:
        return lambda session: registry.transition(version, "Staging", session)

    return [promotion(registry.new_version()) for _ in range(clients)]


def _at_once(promises: Sequence[Promise]) -> list[float]:
    """The seconds of each client, all of which begin at the same moment."""
    ready = threading.Barrier(len(promises))

    def ask(promise: Promise) -> float:
        with requests.Session() as session:
            ready.wait(timeout=60)
            began = time.perf_counter()
            promise(session)
            return time.perf_counter() - began

    with ThreadPoolExecutor(len(promises)) as pool:
        return list(pool.map(ask, promises))
