"""A small server for MLflow's webhooks: a delivery that is one wakes a watcher."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from mlflow_safelock.errors import SettingsError
from mlflow_safelock.operations.deliveries import Deliveries
from mlflow_safelock.settings import read_settings, variable_of

_logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
"""Largest body that is read; MLflow's have some hundred bytes."""

READ_SECONDS = 10.0
"""How long a body may take."""

MAX_CONNECTIONS = 64

_STATUS = {"new": 202, "repeated": 200, "refused": 401}


def webhook_app(deliveries: Deliveries, wake: Callable[[], None]) -> Starlette:
    """An app that takes deliveries at any path: 202 for a new one, 200 for a repeated one, else 401."""

    async def take(request: Request) -> Response:
        try:
            body = await asyncio.wait_for(_body_of(request), READ_SECONDS)
        except TimeoutError:
            return PlainTextResponse("The body took too long.", 408)
        if body is None:
            return PlainTextResponse("The body is too large.", 413)
        verdict = deliveries.judge(request.headers, body)
        if verdict == "new":
            wake()
        elif verdict == "refused":
            _logger.warning(
                "A request that is no delivery was refused: its signature or its time is wrong (from %s)",
                request.client.host if request.client else "nowhere",
            )
        return PlainTextResponse(verdict, _STATUS[verdict])

    return Starlette(routes=[Route("/{path:path}", take, methods=["POST"])])


async def _body_of(request: Request) -> bytes | None:
    """The body, as far as it is one that is read."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            return None
    return body


def webhook_secret() -> bytes:
    """The secret that deliveries are signed with.

    Raises:
        SettingsError: None is set.
    """
    secret = read_settings().webhook_secret
    if secret is None:
        raise SettingsError(
            "There is no secret to tell deliveries of webhooks from other requests by.",
            next_step=f"Set {variable_of('webhook_secret')} to the secret that the webhook was created with.",
        )
    return secret.get_secret_value().encode()


@contextmanager
def listening(host: str, port: int, app: Starlette) -> Iterator[tuple[str, int]]:
    """Serve an app in a thread of this process; gives the address.

    Raises:
        OSError: The address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with listener:
        listener.bind((host, port))
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=5,
            )
        )
        serving = threading.Thread(target=server.run, args=([listener],), name="safelock-webhooks")
        serving.start()
        try:
            yield listener.getsockname()[:2]
        finally:
            server.should_exit = True
            serving.join()
