"""``safelock reconcile --watch``: pass after pass, and a line for what each of them did."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from mlflow_safelock.cli.command import results
from mlflow_safelock.cli.output import announce, shown
from mlflow_safelock.cli.repairs import facts_of

if TYPE_CHECKING:
    from mlflow_safelock.gate.reconciling import Repair, Way
    from mlflow_safelock.operations.reconciliation import Reconciliation
    from mlflow_safelock.operations.watching import Watcher

INTERVAL = 30.0
"""Seconds between two passes where nothing else is said."""

MAX_PORT = 65535


def address_of(text: str) -> tuple[str, int]:
    """Host and port out of ``HOST:PORT``; an IPv6 host in brackets.

    Raises:
        click.BadParameter: It is none.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:
        raise click.BadParameter(f"{text!r} is not HOST:PORT, as in 127.0.0.1:8765.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def watch_registry(
    reconciliation: Reconciliation,
    ways: Sequence[Way],
    interval: float,
    listen: tuple[str, int] | None,
    form: str,
) -> None:
    """Pass over a registry until a signal comes; a line for each repair, and for what is left."""
    from mlflow_safelock.operations.watching import Watcher, stopped_by_signals

    stream = results()

    def tell(repair: Repair) -> None:
        stream.write((_as_json(repair) if form == "json" else _as_line(repair)) + "\n")
        stream.flush()

    watcher = Watcher(reconciliation, ways, interval, tell)
    with stopped_by_signals(watcher), ExitStack() as until_done:
        if listen is not None:
            host, port = until_done.enter_context(_woken_by_webhooks(watcher, *listen))
            announce(f"Listening at {host}:{port}")
        announce(f"Watching, every {interval:g} seconds")
        watcher.run()
    click.echo("Stopped.", err=True)


def _woken_by_webhooks(watcher: Watcher, host: str, port: int) -> AbstractContextManager[tuple[str, int]]:
    from mlflow_safelock.operations.deliveries import Deliveries
    from mlflow_safelock.operations.listening import listening, webhook_app, webhook_secret

    return listening(host, port, webhook_app(Deliveries(webhook_secret()), watcher.wake))


def _as_json(repair: Repair) -> str:
    return json.dumps({"time": _now(), **facts_of(repair)})


def _as_line(repair: Repair) -> str:
    request, refusal = repair.difference.request, repair.refusal
    why = f" Refused [{refusal.reason}]: {refusal.cause}" if refusal else ""
    done = repair.done or "left as it is"
    line = f"{_now()} {request.name} version {request.version}: {done}. It {repair.difference.what}{why}"
    return shown(line)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
