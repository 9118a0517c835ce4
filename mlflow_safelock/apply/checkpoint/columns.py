"""The locked columns of an output projection, read from its file and from nothing else of it.

A file is mapped into memory, and what is touched of it counts as memory of the process until it is unmapped,
neighbours included. So a weight is read in bands of rows, and the file is mapped anew for each: memory stays
bounded however large the weight is.
"""

from __future__ import annotations

import torch

from mlflow_safelock.apply.checkpoint.fp8 import CODE, SCALE_SUFFIX, Fp8Scheme, unknown_scheme
from mlflow_safelock.apply.checkpoint.source import CheckpointSource
from mlflow_safelock.apply.checkpoint.weights import StoredWeights
from mlflow_safelock.apply.displacement import HeadWeight, head_columns
from mlflow_safelock.errors import CheckpointError

_BAND_BYTES = 12 << 20


def columns_of(source: CheckpointSource, path: str) -> HeadWeight:
    """Make a reader of a projection's columns.

    Args:
        source: The checkpoint.
        path: Name of the output projection.

    Returns:
        What reads the columns of ``W_o`` that belong to a head, ``[hidden, head_dim]``, in float64; they
        stand until the next head's are read. A number of 16 or 32 bits is the same number in float64; one of
        8 bits is multiplied by its scale.

    Raises:
        CheckpointError: Scales are missing or of another shape.
    """
    weights, name, head_dim = source.weights, f"{path}.weight", source.geometry.head_dim
    if source.architecture.layout == "conv1d":
        return lambda head: _rows(weights, name, head_columns(head, head_dim)).double().T
    if weights.tensors[name].code != CODE:
        # One for all heads: memory that each takes and gives back stays with the process.
        columns = torch.empty(weights.tensors[name].shape[0], head_dim, dtype=torch.float64)
        return lambda head: _read_columns(weights, name, head_columns(head, head_dim), into=columns)
    scheme, scales = _scales(source, path)
    codes = torch.empty(weights.tensors[name].shape[0], head_dim, dtype=torch.float8_e4m3fn)
    return lambda head: scheme.dequantised(
        _read_columns(weights, name, head_columns(head, head_dim), into=codes), scales, head * head_dim
    )


def bias_dtype(source: CheckpointSource, path: str) -> torch.dtype:
    """The dtype of a projection's bias: that of its weight, or the model's where that has 8 bits.

    Raises:
        CheckpointError: The weight is not of floating point numbers, or not of those the configuration says.
    """
    name = f"{path}.weight"
    weight, configured = source.weights.tensors[name], source.config.dtype
    if weight.code == CODE and source.fp8 is not None:
        return configured if isinstance(configured, torch.dtype) else torch.bfloat16
    if weight.dtype is None:
        raise unknown_scheme(f"{name} in {source.layout.model} is stored as {weight.code}")
    if isinstance(configured, torch.dtype) and weight.dtype != configured:
        raise CheckpointError(
            f"{name} in {source.layout.model} is stored as {weight.code}, and the configuration says "
            f"{configured}: transformers would round it on loading.",
            next_step="Load the fine-tune with dtype='auto' and save it with save_pretrained.",
        )
    return weight.dtype


def _read_columns(weights: StoredWeights, name: str, columns: slice, *, into: torch.Tensor) -> torch.Tensor:
    band = max(1, _BAND_BYTES // weights.tensors[name].row_bytes)
    for first in range(0, len(into), band):
        with weights.open(name) as stored:
            into[first : first + band] = stored[first : first + band, columns]
    return into


def _rows(weights: StoredWeights, name: str, rows: slice) -> torch.Tensor:
    with weights.open(name) as stored:
        read: torch.Tensor = stored[rows].clone()
        return read


def _scales(source: CheckpointSource, path: str) -> tuple[Fp8Scheme, torch.Tensor]:
    name, weight = path + SCALE_SUFFIX, source.weights.tensors[f"{path}.weight"]
    stored, scheme = source.weights.tensors.get(name), source.fp8
    if scheme is None or stored is None or stored.dtype is None:
        raise unknown_scheme(f"{source.layout.model} holds {path}.weight without scales at {name}")
    expected = scheme.scale_shape(weight.shape)
    if stored.shape != expected:
        blocks = "no blocks make" if scheme.block is None else f"blocks of {scheme.block} make"
        raise CheckpointError(
            f"{name} in {source.layout.model} is of shape {stored.shape}, and {blocks} it {expected}.",
            next_step="Copy the fine-tune again, or quantise it anew: transformers would not load it so.",
        )
    return scheme, source.weights.read(name)
