"""Locking a model in memory: the locked columns alone, or the whole matrix as the method's authors do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Contender, Settings, compare
from benchmarks.locks import LLAMA_3_8B, LLAMA_3_70B, lock_for
from benchmarks.results import Row
from mlflow_safelock import SafetyLock, apply_lock
from mlflow_safelock.lock import AttentionGeometry
from tests.models import random_lock
from tests.thin_llama import fill

ALPHA = 6.0
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SMALL = AttentionGeometry(layers=4, heads=8, head_dim=64, hidden=512)

Projections = Mapping[int, nn.Linear]
"""The attention output projections of the locked layers, by layer."""


def run(settings: Settings) -> Iterator[Row]:
    """Apply in memory at the attention shapes of Llama-3-8B and Llama-3-70B."""
    if settings.quick:
        yield _compare("small, float32", random_lock(SMALL), torch.float32, settings)
        return
    for published in (LLAMA_3_8B, LLAMA_3_70B):
        lock, origin = lock_for(published, settings.shared)
        for name, dtype in DTYPES.items():
            case = f"{published.title}, {name}, {origin} ({len(lock.heads)} heads, {len(lock.layers)} layers)"
            yield _compare(case, lock, dtype, settings)


def _compare(case: str, lock: SafetyLock, dtype: torch.dtype, settings: Settings) -> Row:
    model = _skeleton(lock, dtype)
    projections = {layer: model.model.layers[layer].self_attn.o_proj for layer in lock.layers}
    geometry = lock.geometry
    columns = len(lock.heads) * geometry.head_dim
    read = columns * geometry.hidden * dtype.itemsize
    whole = sum(projection.weight.nbytes for projection in projections.values())
    buffer = torch.empty(geometry.hidden, geometry.head_dim, dtype=dtype)
    return compare(
        "apply",
        case,
        ours=Contender("apply_lock", lambda: apply_lock(model, lock, ALPHA), lambda handle: handle.remove()),
        theirs=Contender(
            "F.linear with the whole W_o and a full displacement per layer",
            lambda: _lock_by_whole_matrices(projections, lock),
            lambda _: _unlock(projections),
        ),
        limit=Contender(
            f"gather {columns} columns of {geometry.hidden}: {read / 1e6:.0f} MB",
            lambda: _gather(projections, lock, buffer),
        ),
        repetitions=settings.repetitions(21),
        figures={
            "MB of the whole matrices": whole / 1e6,
            "error of ours": _error_of_ours(model, projections, lock),
            "error of theirs": _error_of_theirs(projections, lock),
        },
    )


def _skeleton(lock: SafetyLock, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of the lock's geometry whose only weights are the output projections of the locked layers."""
    geometry = lock.geometry
    config = LlamaConfig(
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.heads,
        head_dim=geometry.head_dim,
        hidden_size=geometry.hidden,
        intermediate_size=64,
        vocab_size=64,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for layer in lock.layers:
        projection = model.model.layers[layer].self_attn.o_proj
        projection.weight = nn.Parameter(
            torch.empty(projection.weight.shape, dtype=dtype), requires_grad=False
        )
    fill(model)
    return model


@torch.no_grad()
def _lock_by_whole_matrices(projections: Projections, lock: SafetyLock) -> None:
    """The same biases as the method's authors make them (arXiv 2410.10343): no column is left out."""
    geometry = lock.geometry
    for layer, projection in projections.items():
        displacement = np.zeros((geometry.heads, geometry.head_dim))
        for locked in lock.heads_of_layer(layer):
            displacement[locked.head] = ALPHA * locked.std * locked.direction
        full = torch.from_numpy(displacement.reshape(-1)).to(projection.weight.dtype)
        projection.bias = nn.Parameter(functional.linear(full, projection.weight), requires_grad=False)


def _unlock(projections: Projections) -> None:
    for projection in projections.values():
        projection.register_parameter("bias", None)


@torch.no_grad()
def _gather(projections: Projections, lock: SafetyLock, buffer: torch.Tensor) -> None:
    """Copy the locked columns into one small block, which is the least that reading them takes."""
    width = lock.geometry.head_dim
    for locked in lock.heads:
        start = locked.head * width
        buffer.copy_(projections[locked.layer].weight[:, start : start + width])


def _error_of_ours(model: LlamaForCausalLM, projections: Projections, lock: SafetyLock) -> float:
    with apply_lock(model, lock, ALPHA):
        return _error(projections, lock)


def _error_of_theirs(projections: Projections, lock: SafetyLock) -> float:
    _lock_by_whole_matrices(projections, lock)
    try:
        return _error(projections, lock)
    finally:
        _unlock(projections)


def _error(projections: Projections, lock: SafetyLock) -> float:
    """Largest distance of a layer's bias from ``W_o v`` in float64, relative to its length."""
    width, errors = lock.geometry.head_dim, []
    for layer, projection in projections.items():
        expected = np.zeros(lock.geometry.hidden)
        for locked in lock.heads_of_layer(layer):
            start = locked.head * width
            columns = projection.weight.detach()[:, start : start + width].double().numpy()
            expected += columns @ (ALPHA * locked.std * locked.direction.astype(np.float64))
        bias = projection.bias.detach().double().numpy()
        errors.append(float(np.linalg.norm(bias - expected) / np.linalg.norm(expected)))
    return max(errors)
