"""A registry that wants its model measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.registry.evidence import Shop
from tests.toy import Toy


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shop(client: Any, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Shop:
    return Shop(client, toy, tmp_path, monkeypatch)
