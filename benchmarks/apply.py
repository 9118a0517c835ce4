"""Locking a model in memory: the locked columns alone, or the whole matrix as the method's authors do."""

from __future__ import annotations

from collections.abc import Iterator

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
    skeleton = Skeleton(lock, dtype)
    columns = len(lock.heads) * lock.geometry.head_dim
    return compare(
        "apply",
        case,
        ours=Contender(
            "apply_lock", lambda: apply_lock(skeleton.model, lock, ALPHA), lambda handle: handle.remove()
        ),
        theirs=Contender(
            "F.linear with the whole W_o and a full displacement per layer",
            skeleton.lock_by_whole_matrices,
            lambda _: skeleton.unlock(),
        ),
        limit=Contender(
            f"gather {columns} columns of {lock.geometry.hidden}: {skeleton.locked_bytes / 1e6:.0f} MB",
            skeleton.gather,
        ),
        repetitions=settings.repetitions(21),
        figures={
            "MB of the whole matrices": skeleton.whole_bytes / 1e6,
            "error of ours": skeleton.error_of_ours(),
            "error of theirs": skeleton.error_of_theirs(),
        },
    )


class Skeleton:
    """A Llama of a lock's geometry whose only weights are the output projections of the locked layers.

    Args:
        lock: The lock.
        dtype: Dtype of the weights.
        device: Where they are.

    Attributes:
        model: The Llama.
    """

    def __init__(self, lock: SafetyLock, dtype: torch.dtype, device: str = "cpu") -> None:
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
            self.model = LlamaForCausalLM(config)
        self._lock = lock
        self._projections = {layer: self.model.model.layers[layer].self_attn.o_proj for layer in lock.layers}
        for projection in self._projections.values():
            empty = torch.empty(projection.weight.shape, dtype=dtype)
            projection.weight = nn.Parameter(empty, requires_grad=False)
        fill(self.model)
        for projection in self._projections.values():
            projection.to(device)
        self._buffer = torch.empty(geometry.hidden, geometry.head_dim, dtype=dtype, device=device)

    @property
    def locked_bytes(self) -> int:
        """Bytes of the locked columns."""
        return len(self._lock.heads) * self._buffer.nbytes

    @property
    def whole_bytes(self) -> int:
        """Bytes of the matrices that they are in."""
        return sum(projection.weight.nbytes for projection in self._projections.values())

    @torch.no_grad()
    def lock_by_whole_matrices(self) -> None:
        """Make the biases as the method's authors do (arXiv 2410.10343): no column is left out."""
        geometry = self._lock.geometry
        for layer, projection in self._projections.items():
            displacement = np.zeros((geometry.heads, geometry.head_dim))
            for locked in self._lock.heads_of_layer(layer):
                displacement[locked.head] = ALPHA * locked.std * locked.direction
            full = torch.from_numpy(displacement.reshape(-1)).to(projection.weight)
            projection.bias = nn.Parameter(functional.linear(full, projection.weight), requires_grad=False)

    def unlock(self) -> None:
        """Take those biases away again."""
        for projection in self._projections.values():
            projection.register_parameter("bias", None)

    @torch.no_grad()
    def gather(self) -> None:
        """Copy the locked columns into one small block, which is the least that reading them takes."""
        width = self._lock.geometry.head_dim
        for locked in self._lock.heads:
            start = locked.head * width
            self._buffer.copy_(self._projections[locked.layer].weight[:, start : start + width])

    def error_of_ours(self) -> float:
        """Largest distance of a layer's bias from ``W_o v`` in float64, relative to its length."""
        with apply_lock(self.model, self._lock, ALPHA):
            return self._error()

    def error_of_theirs(self) -> float:
        """The same of the authors' way."""
        self.lock_by_whole_matrices()
        try:
            return self._error()
        finally:
            self.unlock()

    def _error(self) -> float:
        width, errors = self._lock.geometry.head_dim, []
        for layer, projection in self._projections.items():
            expected = np.zeros(self._lock.geometry.hidden)
            for locked in self._lock.heads_of_layer(layer):
                start = locked.head * width
                columns = projection.weight.detach()[:, start : start + width].double().cpu().numpy()
                expected += columns @ (ALPHA * locked.std * locked.direction.astype(np.float64))
            bias = projection.bias.detach().double().cpu().numpy()
            errors.append(float(np.linalg.norm(bias - expected) / np.linalg.norm(expected)))
        return max(errors)
