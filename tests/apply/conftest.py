"""What the tests of the apply room share."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from mlflow_safelock.apply import geometry_from_config
from mlflow_safelock.lock import SafetyLock
from tests.models import random_lock, tiny_model

TOKENS = torch.tensor([[5, 17, 200, 31, 8, 90, 120, 44], [60, 61, 7, 19, 300, 2, 9, 77]])


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of a few fixed tokens."""
    return model(TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def lock_for(model: PreTrainedModel, heads: int = 5, seed: int = 0) -> SafetyLock:
    """A random lock of a model's attention shape."""
    return random_lock(geometry_from_config(model.config), heads=heads, seed=seed)


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def lock(llama: PreTrainedModel) -> SafetyLock:
    return lock_for(llama)
