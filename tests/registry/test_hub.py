"""Weights that are fetched from a hub: which files, by their names, and of what models."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlflow_safelock.errors import SourceError
from mlflow_safelock.gate.source import HubReference
from mlflow_safelock.registry.hub import write_weights
from tests.models import CHATML, tiny_model, tiny_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ELSEWHERE = "89abcdef0123456789abcdef0123456789abcdef"
REPOSITORY = "org/fine-tune"


class Hub:
    """Repositories by name and commit, as a hub's own client asks for them over HTTP."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.fetched: list[str] = []

    def answer(self, path: str, *, whole: bool) -> tuple[int, dict[str, str], bytes]:
        for (name, commit), files in self.repositories.items():
            if path.startswith(f"/api/models/{name}/revision/{commit}"):
                siblings = [{"rfilename": file} for file in files]
                described = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
                return 200, {"Content-Type": "application/json"}, json.dumps(described).encode()
            if path.startswith(f"/api/models/{name}/tree/{commit}"):
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": "0"}
                    for file, data in files.items()
                ]
                return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
            place = f"/{name}/resolve/{commit}/"
            if path.startswith(place) and path.removeprefix(place) in files:
                file = path.removeprefix(place)
                if whole:
                    self.fetched.append(file)
                return 200, {"ETag": f'"{name}-{file}"', "X-Repo-Commit": commit}, files[file]
        return 404, {"X-Error-Code": "EntryNotFound"}, b""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _send(self, *, whole: bool) -> None:
            status, headers, body = found.answer(self.path.split("?")[0], whole=whole)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if whole:
                self.wfile.write(body)

        def do_GET(self) -> None:
            self._send(whole=True)

        def do_HEAD(self) -> None:
            self._send(whole=False)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "saved"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer(CHATML).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def mlmodel(**flavor: Any) -> bytes:
    """What MLflow writes for a model that it logs without weights."""
    described = {
        "flavors": {
            "transformers": {
                "source_model_name": REPOSITORY,
                "source_model_revision": COMMIT,
                "task": "text-generation",
                "transformers_version": "5.0.0",
                **flavor,
            }
        },
        "mlflow_version": "3.0.0",
        "model_uuid": "1",
        "utc_time_created": "2026-01-01 00:00:00",
    }
    return yaml.safe_dump(described).encode()


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_weights_and_tokenizer_are_fetched_and_nothing_that_is_or_may_hold_code(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[REPOSITORY, COMMIT] = {
        **files,
        "modeling_evil.py": b"raise SystemExit",
        "tokenization_evil.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickled",
        "training_args.bin": b"pickled",
        "nested/model.safetensors": b"of something else",
        "tokenizer/tokenizer.json": b"of something else",
        "consolidated.safetensors": b"the same in another layout",
        "README.md": b"text",
    }
    write_weights(mlmodel(components=["tokenizer"]), HubReference(REPOSITORY, COMMIT), tmp_path / "out")
    assert names(tmp_path / "out") == {
        "MLmodel",
        *(f"model/{name}" for name in ("config.json", "generation_config.json", "model.safetensors")),
        *(
            f"components/tokenizer/{name}"
            for name in files
            if name.startswith(("tokenizer", "chat_template"))
        ),
    }
    assert set(hub.fetched) == {
        Path(name).name for name in names(tmp_path / "out") - {"MLmodel"}
    }  # nothing else was even asked for
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / "model" / name).read_bytes() == files[name]
    written = yaml.safe_load((tmp_path / "out" / "MLmodel").read_text())["flavors"]["transformers"]
    assert "source_model_revision" not in written
    assert written["model_binary"] == "model"


def test_a_tokenizer_of_another_repository_is_taken_from_there(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[REPOSITORY, COMMIT] = files
    other = {"tokenizer.json": b"{}", "config.json": b"{}"}
    hub.repositories["org/other", ELSEWHERE] = other
    described = mlmodel(components=["tokenizer"], tokenizer_name="org/other", tokenizer_revision=ELSEWHERE)
    write_weights(described, HubReference(REPOSITORY, COMMIT), tmp_path / "out")
    assert names(tmp_path / "out" / "components") == {"tokenizer/tokenizer.json"}
    assert (tmp_path / "out" / "components" / "tokenizer" / "tokenizer.json").read_bytes() == b"{}"
    assert (tmp_path / "out" / "model" / "config.json").read_bytes() == files["config.json"]


@pytest.mark.parametrize(
    ("flavor", "told"),
    [
        ({"components": ["tokenizer", "image_processor"]}, "parts beside a tokenizer .*image_processor"),
        ({"components": ["tokenizer"], "processor_type": "Evil"}, "parts beside a tokenizer"),
        (
            {"components": ["tokenizer"], "tokenizer_name": "org/other", "tokenizer_revision": "main"},
            "tokenizer comes from 'org/other', which is no repository of a hub at a commit",
        ),
        (
            {"components": ["tokenizer"], "tokenizer_name": "/etc", "tokenizer_revision": ELSEWHERE},
            "tokenizer comes from '/etc'",
        ),
    ],
)
def test_what_is_not_at_a_commit_or_has_further_parts_is_refused(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, flavor: dict[str, Any], told: str
) -> None:
    hub.repositories[REPOSITORY, COMMIT] = files
    with pytest.raises(SourceError, match=told):
        write_weights(mlmodel(**flavor), HubReference(REPOSITORY, COMMIT), tmp_path / "out")


def test_a_repository_without_safetensors_weights_is_refused(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[REPOSITORY, COMMIT] = {
        "config.json": files["config.json"],
        "pytorch_model.bin": b"pickled",
    }
    with pytest.raises(SourceError, match=r"no safetensors weights in 'org/fine-tune'"):
        write_weights(mlmodel(components=[]), HubReference(REPOSITORY, COMMIT), tmp_path / "out")
