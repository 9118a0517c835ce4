"""How much of a lock's push arrives in a fine-tune: weights can be edited so that next to nothing does.

A lock's bias ``W_o' v`` is made of the fine-tune's own ``W_o'``. Whoever divides that by a hundred, and
multiplies the values by as much, or takes the lock's directions out of it, has a model that does the same and
is hardly pushed. Against that stands what the push is in the base, ``p = W_o v``, which a lock with unit
biases knows: the share of it that arrives is ``<W_o' v, p> / <p, p>``, 1 in the base itself and near 1 in
what was trained from it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mlflow_safelock.apply.displacement import base_biases
from mlflow_safelock.errors import LockWithoutEffectError
from mlflow_safelock.lock import SafetyLock

LEAST_SHARE = 0.5
"""Share of a layer's push, as it is in the base, that has to arrive: far below any fine-tune's."""

NEXT_STEP = (
    "Use a fine-tune whose attention output projections were trained, and not rescaled or edited. If its own "
    "base is like this already, forge a lock from that one."
)


def shares_of(pushes: Mapping[int, torch.Tensor], lock: SafetyLock, alpha: float) -> dict[int, float]:
    """The share of a lock's push that arrives in each locked layer.

    Args:
        pushes: What the lock adds to the output of each layer's projection, ``[hidden]``, by layer.
        lock: A lock with unit biases.
        alpha: The strength that the pushes are for.

    Returns:
        By layer, of those that the lock pushes in its base.

    Raises:
        ApplyError: The lock has no unit biases.
    """
    shares = {}
    for layer, expected in base_biases(lock, alpha).items():
        size = float(expected @ expected)
        if size:
            shares[layer] = float(pushes[layer].detach().to("cpu", torch.float64) @ expected) / size
    return shares


def check_effect(pushes: Mapping[int, torch.Tensor], lock: SafetyLock, alpha: float, name: str) -> None:
    """Raise unless at least half of a lock's push arrives in every locked layer.

    Nothing is told for a lock without unit biases.

    Args:
        pushes: What the lock adds to the output of each layer's projection, ``[hidden]``, by layer.
        lock: The lock.
        alpha: The strength that the pushes are for.
        name: The model's name, for the error.

    Raises:
        LockWithoutEffectError: Less does.
    """
    if lock.unit_biases is not None:
        check_shares(shares_of(pushes, lock, alpha), name)


def check_shares(shares: Mapping[int, float], name: str) -> None:
    """Raise unless each share is at least a half; a number that is none is less.

    Args:
        shares: By layer.
        name: The model's name, for the error.

    Raises:
        LockWithoutEffectError: One is less.
    """
    for layer, share in sorted(shares.items(), key=lambda item: item[1]):
        if not share >= LEAST_SHARE:
            raise LockWithoutEffectError(
                f"Of the push that the lock makes in its base, {share:.0%} arrives in layer {layer} of "
                f"{name}, and {LEAST_SHARE:.0%} has to: it would be served all but unlocked.",
                next_step=NEXT_STEP,
            )
