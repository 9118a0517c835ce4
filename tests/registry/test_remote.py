"""Folders behind HTTP servers and other stores: parts where the server sends parts, otherwise whole files."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import mlflow
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlflow_safelock.errors import SourceError, UnreachableError
from mlflow_safelock.provenance import LocalArtifacts, check_fingerprint, take_fingerprint
from mlflow_safelock.registry.artifacts import RegistryArtifacts
from mlflow_safelock.registry.proxied import ProxiedArtifacts
from mlflow_safelock.registry.ranges import group_spans
from mlflow_safelock.registry.remote import RemoteArtifacts
from tests.servers import mlflow_server

WEIGHTS = "model/model.safetensors"
ROOT = "/api/2.0/mlflow-artifacts/artifacts"


@dataclass
class Proxy:
    """An artifact proxy with MLflow's routes; what it does with ranges can be chosen."""

    folder: Path
    url: str = ""
    ranges: bool = True
    short: bool = False
    status: int | None = None
    sent: list[tuple[str, int]] = field(default_factory=list)

    @property
    def bytes_sent(self) -> int:
        return sum(size for _, size in self.sent)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "model").mkdir(parents=True)
    (folder / "MLmodel").write_text("flavors: {}\n")
    generator = np.random.default_rng(0)
    tensors = {f"layer.{i}": generator.normal(size=(256, 1024)).astype(np.float32) for i in range(6)}
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.fixture
def proxy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    proxy = Proxy(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(proxy))
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_port}{ROOT}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield proxy
    server.shutdown()
    server.server_close()


def handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlparse(self.path)
            if url.path == ROOT:
                below = parse_qs(url.query).get("path", [""])[0]
                self._send(200, json.dumps({"files": self._entries(below)}).encode(), {})
                return
            data = (proxy.folder / url.path.removeprefix(f"{ROOT}/")).read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            status, headers = 200, {"ETag": f'"{hash(data)}"'}
            if wanted and proxy.ranges:
                first, last = (int(part) for part in wanted.groups())
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                status, data = 206, data[first : last + 1]
                if proxy.short:
                    data = data[:-1]
            if proxy.status is not None:
                status, data = proxy.status, b"no"
            proxy.sent.append((url.path, len(data)))
            self._send(status, data, headers)

        def _entries(self, below: str) -> list[dict[str, object]]:
            if not (proxy.folder / below).is_dir():
                return []
            return [
                {"path": path.name, "is_dir": path.is_dir(), "file_size": path.stat().st_size}
                for path in (proxy.folder / below).iterdir()
            ]

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response_only(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.mark.parametrize("ranges", [True, False])
def test_a_proxied_folder_reads_like_the_local_one(proxy: Proxy, folder: Path, ranges: bool) -> None:
    proxy.ranges = ranges
    remote, local = RegistryArtifacts().reader(proxy.url), LocalArtifacts(folder)
    assert isinstance(remote, ProxiedArtifacts)
    assert remote.files() == local.files()
    spans = [(5, 3), (0, 0), (100_000, 70_000), (3_000_000, 4096)]
    assert remote.read_many(WEIGHTS, spans) == local.read_many(WEIGHTS, spans)
    for file in local.files():
        assert remote.read(file.path) == local.read(file.path)
    check_fingerprint(take_fingerprint(ProxiedArtifacts(proxy.url)), local)


def test_little_is_read_of_a_server_that_sends_parts(proxy: Proxy, folder: Path) -> None:
    size = (folder / WEIGHTS).stat().st_size
    take_fingerprint(ProxiedArtifacts(proxy.url))
    assert 0 < proxy.bytes_sent < 0.03 * size


def test_a_server_that_sends_no_parts_sends_each_file_to_the_end_once(proxy: Proxy) -> None:
    proxy.ranges = False
    reader = ProxiedArtifacts(proxy.url)
    take_fingerprint(reader)
    asked = len([path for path, _ in proxy.sent if path.endswith(WEIGHTS)])
    assert asked == 2, "once to learn that it sends no parts, once for the file"
    take_fingerprint(reader)
    assert len([path for path, _ in proxy.sent if path.endswith(WEIGHTS)]) == asked


def test_a_file_that_changes_while_it_is_read_is_an_error(proxy: Proxy, folder: Path) -> None:
    reader = ProxiedArtifacts(proxy.url)
    reader.read(WEIGHTS, 0, 100)
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(SourceError, match="was changed while it was read"):
        reader.read(WEIGHTS, 100, 100)


def test_a_part_that_is_too_short_is_an_error(proxy: Proxy) -> None:
    proxy.short = True
    with pytest.raises(SourceError, match="gave 99 bytes in place of the 100"):
        ProxiedArtifacts(proxy.url).read(WEIGHTS, 0, 100)


@pytest.mark.parametrize("status", [403, 404, 416, 503])
def test_a_server_s_refusal_is_an_error_that_names_the_file(proxy: Proxy, status: int) -> None:
    proxy.status = status
    with pytest.raises(SourceError, match=r"model\.safetensors") as info:
        ProxiedArtifacts(proxy.url).read(WEIGHTS, 0, 100)
    assert isinstance(info.value, UnreachableError) is (status == 503)
    assert ("may be over in a while" in str(info.value)) is (status == 503)


def test_nobody_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UnreachableError, match="cannot be listed now"):
        ProxiedArtifacts(f"http://127.0.0.1:1{ROOT}").files()


def test_mlflow_s_own_server_sends_parts(tmp_path: Path, folder: Path) -> None:
    with mlflow_server(tmp_path / "server") as server:
        mlflow.set_tracking_uri(server.url)
        mlflow.set_experiment("parts")
        try:
            with mlflow.start_run() as run:
                mlflow.log_artifacts(str(folder), "model")
            reader = RegistryArtifacts(server.url).reader(f"runs:/{run.info.run_id}/model")
            assert isinstance(reader, ProxiedArtifacts)
            check_fingerprint(take_fingerprint(reader), LocalArtifacts(folder))
            assert not reader._whole, "no file was downloaded whole because the server sends no parts"
        finally:
            mlflow.set_tracking_uri(None)


def test_another_store_is_read_by_whole_files(folder: Path) -> None:
    reader = RemoteArtifacts(folder.as_uri())
    assert reader.files() == LocalArtifacts(folder).files()
    assert reader.read_many(WEIGHTS, [(3, 5), (0, 2)]) == LocalArtifacts(folder).read_many(
        WEIGHTS, [(3, 5), (0, 2)]
    )
    with pytest.raises(SourceError, match=r"'nothing' at .* cannot be read"):
        reader.read("nothing")


def test_an_empty_folder_and_an_unknown_scheme_are_errors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="There are no files"):
        RemoteArtifacts(tmp_path.as_uri()).files()
    with pytest.raises(SourceError, match="no way to read nowhere://x"):
        RegistryArtifacts().reader("nowhere://x").files()


def test_spans_are_grouped_by_their_gaps_and_not_beyond_a_size() -> None:
    far = 10 << 20
    spans = [(far, 10), (0, 10), (10, 10), (5, 2), (90_000, 0), (20 + (64 << 10), 5)]
    assert list(group_spans(spans)) == [((0, 25 + (64 << 10)), [1, 3, 2, 5]), ((far, 10), [0])]
    assert list(group_spans([(0, 8 << 20), (8 << 20, 1)])) == [
        ((0, 8 << 20), [0]),
        ((8 << 20, 1), [1]),
    ]
    assert list(group_spans([])) == []
