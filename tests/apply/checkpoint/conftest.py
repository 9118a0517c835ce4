"""Fine-tunes on disk, as they come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mlflow_safelock.lock import SafetyLock
from tests.apply.conftest import lock_for
from tests.models import CHATML, tiny_model, tiny_tokenizer

CARD = "---\nlicense: apache-2.0\n---\n# Support bot\n\nAnswers questions.\n"

SaveFineTune = Callable[..., tuple[Path, SafetyLock]]


@pytest.fixture(autouse=True)
def _no_progress_bars():
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture
def save_fine_tune(tmp_path: Path) -> SaveFineTune:
    """Saves a tiny fine-tune of a family with tokenizer, chat template and card; gives folder and lock."""

    def save(family: str = "llama", *, shard: str = "1GB", card: str = CARD, **model: Any):
        folder = tmp_path / "fine-tune"
        fine_tune = tiny_model(family, **model)
        fine_tune.generation_config.update(do_sample=True, top_k=7)
        fine_tune.save_pretrained(folder, max_shard_size=shard)
        tiny_tokenizer(CHATML).save_pretrained(folder)
        if card:
            (folder / "README.md").write_text(card)
        return folder, lock_for(fine_tune)

    return save


def load(folder: Path) -> PreTrainedModel:
    """A folder as stock ``transformers`` loads it."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def beside(folder: Path) -> set[str]:
    """What lies in the folder that a folder lies in."""
    return {path.name for path in folder.parent.iterdir()}
