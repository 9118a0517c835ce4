"""What tests of the gate log and promote: a tiny fine-tune, its base's lock, and the calls that do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import sqlalchemy as sa
import torch
from mlflow import MlflowClient
from mlflow.models import ModelSignature, infer_signature

from mlflow_safelock.flavors import meta_safetylock
from mlflow_safelock.lock import SafetyLock
from tests.models import random_lock, tiny_model, tiny_tokenizer


@contextmanager
def just_before(statement: str, work: Callable[[], object]) -> Iterator[None]:
    """Do something the first time that a database is about to be sent a statement that begins so."""
    waiting = iter([work])

    def do_it_first(_connection: Any, _cursor: Any, sent: str, *_more: Any) -> None:
        if sent.startswith(statement):
            for do in waiting:
                do()

    sa.event.listen(sa.Engine, "before_cursor_execute", do_it_first)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", do_it_first)
    assert next(waiting, None) is None, "there was no such statement"


BASE = "org/tiny-base"
REQUIREMENTS = ["mlflow", "torch", "transformers"]
"""Given, because MLflow infers torchvision, which is not there, and fails."""


def fine_tune(family: str = "llama", base: str | None = BASE, **config: Any) -> dict[str, Any]:
    """A tiny model and tokenizer that say that they come from ``base``."""
    model = tiny_model(family, seed=3, **config)
    model.name_or_path = base or ""
    model.config._name_or_path = base or ""
    # Greedy and short: what the tests compare.
    model.generation_config.max_new_tokens = 8
    model.generation_config.do_sample = False
    return {"model": model, "tokenizer": tiny_tokenizer()}


def base_lock(seed: int = 0, base: str = BASE, **geometry: int) -> SafetyLock:
    """A lock of the tiny fine-tune's geometry."""
    from mlflow_safelock.apply.architectures import geometry_from_config

    shape = geometry_from_config(tiny_model("llama").config)
    lock = random_lock(shape.model_copy(update=geometry), seed=seed, base_model=base)
    return SafetyLock(lock.heads, lock.metadata.model_copy(update={"architecture": "llama"}), lock.scores)


SIGNATURE: ModelSignature = infer_signature(
    ["how do i bake"], ["some text"], params={"max_new_tokens": 8, "return_full_text": True}
)


def log_fine_tune(name: str, components: dict[str, Any] | None = None, **options: Any) -> int:
    """Log a fine-tune with ``mlflow.transformers`` and register it; the version's number."""
    arguments = {"signature": SIGNATURE, "input_example": None, **options}
    with mlflow.start_run():
        info = mlflow.transformers.log_model(
            components or fine_tune(),
            name="model",
            task="text-generation",
            registered_model_name=name,
            pip_requirements=REQUIREMENTS,
            **arguments,
        )
    return int(info.registered_model_version)


def register_lock(lock: SafetyLock) -> int:
    """Register a lock where the gate looks; the version's number."""
    with mlflow.start_run():
        return int(meta_safetylock.register(lock).registered_model_version)


def expected_biases(model: torch.nn.Module, lock: SafetyLock, alpha: float) -> dict[int, np.ndarray]:
    """``W_o v`` of every locked layer in float64, head by head, from a Llama-like model's own weights."""
    biases: dict[int, np.ndarray] = {}
    width = lock.geometry.head_dim
    for locked in lock.heads:
        weight = model.model.layers[locked.layer].self_attn.o_proj.weight.detach().double().numpy()
        columns = weight[:, locked.head * width : (locked.head + 1) * width]
        push = alpha * locked.std * locked.direction.astype(np.float64)
        biases[locked.layer] = biases.get(locked.layer, 0.0) + columns @ push
    return biases


def biases_of(model: torch.nn.Module) -> dict[int, np.ndarray]:
    """The output projection biases that a Llama-like model has, by layer."""
    found = {}
    for index, layer in enumerate(model.model.layers):
        bias = layer.self_attn.o_proj.bias
        if bias is not None:
            found[index] = bias.detach().double().numpy()
    return found


def state_of(client: MlflowClient, name: str, version: int) -> dict[str, Any]:
    """Everything about a version that a refused promotion must leave as it was."""
    found = client.get_model_version(name, str(version))
    return {
        "stage": found.current_stage,
        "aliases": sorted(found.aliases),
        "tags": dict(found.tags),
        "source": found.source,
        "location": client.get_model_version_download_uri(name, str(version)),
    }


def unlocked_pipeline(location: str) -> Any:
    """The fine-tune as it was logged, without the lock."""
    return mlflow.transformers.load_model(location)


def files_below(folder: Path) -> set[str]:
    """Paths of all files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
