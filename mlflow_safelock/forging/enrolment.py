"""Adding to a lock what it lacks of its base: a published one has no sketch, unit biases or tokenizer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mlflow_safelock.apply.checkpoint.biases import projection_path
from mlflow_safelock.apply.checkpoint.columns import columns_of
from mlflow_safelock.apply.checkpoint.source import CheckpointSource, read_source
from mlflow_safelock.apply.displacement import Displacement, output_bias
from mlflow_safelock.errors import LockMismatchError
from mlflow_safelock.forging.base_tokenizer import tokenizer_in
from mlflow_safelock.kinship import KinshipSketch, sampled_layers, sampled_offsets
from mlflow_safelock.lock import LockedHead, SafetyLock


def enroll(lock: SafetyLock, base: str | os.PathLike[str]) -> SafetyLock:
    """Give a lock the kinship sketch and the unit biases of its base, and a digest of its tokenizer.

    Only the sampled runs and the locked columns of the weights are read, so a base of any size will do.

    Args:
        lock: A lock; what it has of these is made anew.
        base: Folder of the base model's weights, as ``save_pretrained`` writes it, unquantised. Where it has
            a ``tokenizer.json``, that is the base's tokenizer; without one, what the lock says of it stays.

    Returns:
        The same lock with all that, and so with another digest.

    Raises:
        LockMismatchError: The base has another attention shape than the lock.
        CheckpointError: The folder is damaged, or holds weights of a kind that cannot be read.
        UnsupportedArchitectureError: It is of no known architecture.
        AlreadyLockedError: It was saved with a lock in it.
        SourceError: Its tokenizer cannot be read.
    """
    source = read_source(Path(base))
    if source.geometry != lock.geometry:
        raise LockMismatchError(
            f"The lock is for {lock.geometry}, and {base} has {source.geometry}.",
            next_step=f"Name the folder of {lock.base_model!r}.",
        )
    return replace(
        lock,
        metadata=lock.metadata.model_copy(
            update={"tokenizer": tokenizer_in(Path(base)) or lock.metadata.tokenizer}
        ),
        unit_biases=np.stack([_unit_bias(source, locked) for locked in lock.heads]),
        sketch=_sketch(source),
    )


def _unit_bias(source: CheckpointSource, locked: LockedHead) -> npt.NDArray[np.float32]:
    direction = torch.from_numpy(locked.direction.astype(np.float64))[None]
    unit = Displacement(locked.layer, (locked.head,), direction)
    bias = output_bias(columns_of(source, projection_path(source, locked.layer)), unit)
    return bias.float().numpy()


def _sketch(source: CheckpointSource) -> KinshipSketch:
    layers = sampled_layers(source.geometry.layers)
    offsets, values = [], []
    for layer in layers.tolist():
        name = f"{projection_path(source, layer)}.weight"
        rows, width = source.weights.tensors[name].shape
        starts, length = sampled_offsets(layer, rows * width)
        offsets.append(starts)
        values.append([_run(source, name, start, length, width) for start in starts.tolist()])
    return KinshipSketch(layers, np.array(offsets), np.array(values, dtype=np.float16))


def _run(source: CheckpointSource, name: str, start: int, length: int, width: int) -> npt.NDArray[np.float32]:
    """``length`` numbers of a matrix of that width, counted row by row from ``start``."""
    first, last = start // width, (start + length - 1) // width
    with source.weights.open(name) as stored:
        rows: torch.Tensor = stored[first : last + 1].flatten().float()
    begin = start - first * width
    return rows[begin : begin + length].numpy()
