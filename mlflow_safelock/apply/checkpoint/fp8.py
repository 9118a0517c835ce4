"""Weights of eight bits with a scale for each block, as DeepSeek and Qwen publish them.

A checkpoint of this kind holds ``<projection>.weight`` in float8_e4m3fn and ``<projection>.weight_scale_inv``
with one number for each block of, usually, 128 x 128 weights: a weight is the stored number times the number
of its block. Other schemes of eight bits name or use their scales in other ways and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mlflow_safelock.errors import CheckpointError

CODE = "F8_E4M3"
"""What safetensors calls float8_e4m3fn."""

SCALE_SUFFIX = ".weight_scale_inv"


@dataclass(frozen=True)
class Fp8Scheme:
    """How a checkpoint's weights of eight bits are scaled.

    Attributes:
        block: Rows and columns of a block; ``None`` where a whole weight has one scale.
    """

    block: tuple[int, int] | None

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a weight."""
        if self.block is None:
            return ()
        return tuple(-(-length // step) for length, step in zip(shape, self.block, strict=True))

    def dequantised(self, stored: torch.Tensor, scales: torch.Tensor, first_column: int) -> torch.Tensor:
        """The weights that some columns stand for.

        Args:
            stored: The columns, ``[rows, columns]``, in float8_e4m3fn.
            scales: The scales of the whole weight.
            first_column: Which column of the whole weight comes first.

        Returns:
            Float64, of the same shape.
        """
        plain = stored.to(torch.float32).double()
        if self.block is None:
            return plain * scales.double()
        high, wide = self.block
        rows = torch.arange(stored.shape[0]) // high
        columns = torch.arange(first_column, first_column + stored.shape[1]) // wide
        return plain * scales.double()[rows][:, columns]


def scheme_of(quantization: object) -> Fp8Scheme | None:
    """The scheme that a ``quantization_config`` describes; ``None`` for one that is not known here."""
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        return None
    if quantization.get("fmt", "e4m3") != "e4m3" or quantization.get("scale_fmt", "float") != "float":
        return None
    return _scheme_with(quantization.get("weight_block_size", (128, 128)))


def _scheme_with(block: Any) -> Fp8Scheme | None:
    if block is None:
        return Fp8Scheme(None)
    sizes = tuple(block) if isinstance(block, list | tuple) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    return Fp8Scheme((sizes[0], sizes[1]))


def unknown_scheme(what: str) -> CheckpointError:
    """The error for weights that are quantised in a way that is not known here."""
    return CheckpointError(
        f"{what}: quantised weights other than float8_e4m3fn with weight_scale_inv cannot be locked on disk.",
        next_step="Lock the fine-tune before it is quantised, or lock it in memory: apply_lock.",
    )
