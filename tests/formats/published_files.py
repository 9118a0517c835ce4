"""Files in the layout of the published locks, sound and hostile, written with torch's own archive writer."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlflow_safelock.recipes import LockRecipe

Content = Mapping[str, Sequence[tuple[Any, Any, Any]]]


def direction(seed: int, head_dim: int = 128) -> np.ndarray:
    """A random direction as the authors store one: normalised in float16."""
    values = np.random.default_rng(seed).normal(size=head_dim).astype(np.float16)
    return (values / np.float16(np.linalg.norm(values.astype(np.float64)))).astype(np.float16)


def entry(head: int, seed: int = 0, *, std: float = 0.5, head_dim: int = 128) -> tuple[Any, Any, Any]:
    return np.int64(head), direction(seed, head_dim), np.float16(std)


def layer_key(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.head_out"


def content_for(recipe: LockRecipe, *, seed: int = 0) -> dict[str, list[tuple[Any, Any, Any]]]:
    """Random content of the very shape that the recipe expects: its heads over its span of layers."""
    geometry, published = recipe.base.geometry, recipe.published
    assert published is not None
    first, last = published.layers
    layers = np.linspace(first, last, published.heads // 2, dtype=int).repeat(2)
    content: dict[str, list[tuple[Any, Any, Any]]] = {}
    for index, layer in enumerate(layers):
        held = content.setdefault(layer_key(int(layer)), [])
        head = geometry.heads - 1 - 7 * len(held)
        held.append(entry(head, seed + index, std=0.05 + index / 64, head_dim=geometry.head_dim))
    # The authors' dicts are in no order, and neither are the heads of a layer.
    return dict(sorted(content.items(), key=lambda item: item[0][::-1]))


def pickled(content: object) -> bytes:
    """The pickle that torch.save makes with the authors' NumPy, which knew its modules by other names."""
    return pickle.dumps(content, protocol=2).replace(
        b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    )


def write_archive(path: Path, pickle_bytes: bytes, records: Mapping[str, bytes] | None = None) -> Path:
    """The archive that torch.save writes around a pickle; ``records`` are put in beside it."""
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in {"data.pkl": pickle_bytes, "byteorder": b"little", **(records or {})}.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return path


def write_published(path: Path, content: object) -> Path:
    return write_archive(path, pickled(content))
