"""moto's S3 server behind a relay that counts what passes, and breaks what it is told to break."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests
from moto.server import ThreadedMotoServer

BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@dataclass(frozen=True)
class Passed:
    """One request that passed, and how many bytes of body went which way."""

    method: str
    target: str
    range: str | None
    sent: int
    received: int
    is_copy: bool = False


@dataclass
class Fault:
    """Breaks the next ``times`` requests that ``concerns`` holds for (method and target).

    ``kind`` is ``busy``, ``denied``, ``silent`` (no answer for a second) or ``short`` (half of the body). The
    first ``after`` requests that it concerns pass.
    """

    kind: str
    concerns: Callable[[str, str], bool]
    times: int
    after: int = 0


@dataclass
class S3Server:
    """A running server.

    Attributes:
        url: Endpoint of the relay.
        passed: Every request that passed.
        faults: What is still to be broken.
    """

    url: str
    passed: list[Passed] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(
        self, kind: str, times: int = 1000, method: str = "GET", containing: str = "", after: int = 0
    ) -> None:
        """Break the next requests of a method whose target contains a text, once so many have passed."""
        self.faults.append(Fault(kind, lambda m, target: m == method and containing in target, times, after))

    def fault_for(self, method: str, target: str) -> str | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.concerns(method, target):
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault.kind
        return None

    @property
    def read(self) -> int:
        """Bytes of bodies that clients got."""
        return sum(passed.received for passed in self.passed)

    @property
    def copies(self) -> list[str]:
        """Targets of the copies that the store was asked for and made."""
        return [passed.target for passed in self.passed if passed.is_copy]

    def forget(self) -> None:
        self.passed.clear()


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run moto's server and the relay."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    # Its buckets are the process's, and so those of the tests before.
    requests.post(f"http://{host}:{port}/moto-api/reset", timeout=30).raise_for_status()
    server = S3Server("")
    relay = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server, host, port))
    relay.daemon_threads = True
    server.url = f"http://127.0.0.1:{relay.server_port}"
    threading.Thread(target=relay.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        relay.shutdown()
        relay.server_close()
        moto.stop()


def _handler(server: S3Server, host: str, port: int) -> type[BaseHTTPRequestHandler]:
    class Relay(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            self.upstream = http.client.HTTPConnection(host, port)

        def finish(self) -> None:
            self.upstream.close()
            super().finish()

        def handle_request(self) -> None:
            body = self._body()
            fault = server.fault_for(self.command, self.path)
            if fault == "silent":
                time.sleep(1)
                self.close_connection = True
                return
            if fault in ("busy", "denied"):
                status, data, headers = (503, BUSY, {}) if fault == "busy" else (403, DENIED, {})
            else:
                status, data, headers = self._forward(body)
            server.passed.append(
                Passed(
                    self.command,
                    self.path,
                    self.headers.get("Range"),
                    len(body),
                    len(data),
                    is_copy="x-amz-copy-source" in self.headers and fault is None,
                )
            )
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "content-length" not in {name.lower() for name in headers}:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if fault == "short":
                data, self.close_connection = data[: len(data) // 2], True
            self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return body

        def _forward(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
            left_out = {"transfer-encoding", "content-length", "expect", "connection"}
            headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
            self.upstream.request(
                self.command, self.path, body, {**headers, "Content-Length": str(len(body))}
            )
            answer = self.upstream.getresponse()
            data = answer.read()
            kept = {
                name: value
                for name, value in answer.getheaders()
                if name.lower() not in {"transfer-encoding", "connection"}
            }
            return answer.status, data, kept

        def log_message(self, *_: object) -> None:
            pass

    return Relay
