"""Where a head's output moves from unsafe to safe, and how far it spreads that way (METHOD, forge step 6)."""

from __future__ import annotations

import torch

from mlflow_safelock.errors import ForgeError
from mlflow_safelock.lock import LockedHead

NO_DIFFERENCE = 1e-10
"""Means that differ by less than this, relative to the rows' own size, differ by rounding."""


def locked_head(rows: torch.Tensor, labels: torch.Tensor, layer: int, head: int) -> LockedHead:
    """The direction and scale of one head.

    ``direction = difference / |difference|``, where ``difference = mean(safe rows) - mean(unsafe rows)``;
    ``std = std(rows . direction)``, of the population of all rows (arXiv 2410.10343, section 3). In float64.

    Args:
        rows: The head's outputs, of any floating dtype, ``[rows, head_dim]``.
        labels: ``[rows]``; 1 safe, 0 unsafe.
        layer: Index of the head's layer.
        head: Index of the head.

    Raises:
        ForgeError: Safe and unsafe rows have the same mean, so there is no direction.
    """
    rows, safe = rows.double(), labels.bool()
    difference = rows[safe].mean(dim=0) - rows[~safe].mean(dim=0)
    length = torch.linalg.vector_norm(difference)
    if length <= NO_DIFFERENCE * torch.linalg.vector_norm(rows, dim=1).mean():
        raise ForgeError(
            f"Head {head} of layer {layer} puts out the same for safe and for unsafe answers on average, so "
            "it has no direction.",
            next_step="Lock fewer heads, or forge from more varied pairs.",
        )
    direction = difference / length
    std = (rows @ direction).std(correction=0)
    return LockedHead(layer, head, direction.float().numpy(), float(std))
