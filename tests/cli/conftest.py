"""A way to run commands in this process, and a workshop with a model and its lock."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from click.testing import CliRunner

from mlflow_safelock.cli import main

BASE = "org/tiny-base"


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


Run = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Commands set variables for their own process; here that is the one of all tests."""
    with patch.dict(os.environ):
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            os.environ.pop(name, None)
        yield
        if "mlflow" in sys.modules:
            import mlflow

            mlflow.set_tracking_uri(None)
            mlflow.set_registry_uri(None)


@pytest.fixture
def run() -> Run:
    """Run ``safelock`` with these arguments; a failure that is not expected raises here."""

    def invoke(*arguments: object, input: str | None = None) -> Outcome:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return invoke


@dataclass(frozen=True)
class Workshop:
    """A tiny base model on disk, a lock for it, and a lock for another shape."""

    model: Path
    lock: Path
    other_lock: Path


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    from mlflow_safelock.formats import save_lock
    from tests.models import CHATML, tiny_model, tiny_tokenizer
    from tests.registries import base_lock

    folder = tmp_path_factory.mktemp("workshop")
    model = folder / "base"
    tiny_model("llama", seed=3).save_pretrained(model)
    tiny_tokenizer(CHATML).save_pretrained(model)
    save_lock(base_lock(), folder / "lock.safetensors")
    save_lock(base_lock(layers=5), folder / "other.safetensors")
    return Workshop(model, folder / "lock.safetensors", folder / "other.safetensors")


@pytest.fixture
def gated(client: Any, tmp_path: Path) -> tuple[str, ...]:
    """Options that lead to the gated registry of the fixture ``client``."""
    return (
        *("--tracking-uri", f"sqlite:///{tmp_path}/tracking.db"),
        *("--registry-uri", f"safelock+sqlite:///{tmp_path}/registry.db"),
    )
