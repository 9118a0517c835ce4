"""What a fine-tune's own biases have of a lock's push: one that takes it back would be served as if unlocked.

A lock is a bias ``W_o v_l`` in each locked layer (arXiv 2410.10343 adds ``v_l`` before the projection, which
is the same), and whoever has it can give a fine-tune the same bias with the other sign. For each locked layer
this tells the share ``c_l = <b, p_l> / <p_l, p_l>`` of its push ``p_l`` that the model has already in the
biases ``b`` which are added to the residual stream from there on: -1 takes it back, +1 is the lock itself.

This finds a bias that was put there, and no fine-tuning that undoes a lock in other ways.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mlflow_safelock.apply.architectures import Architecture
from mlflow_safelock.apply.displacement import base_biases
from mlflow_safelock.errors import PromotionRefused
from mlflow_safelock.gate.source import LanguageModel
from mlflow_safelock.lock import SafetyLock

Biases = Mapping[int, npt.NDArray[np.float64]]
"""By layer, each of shape ``[hidden]``."""

TAKEN_BACK = -0.1
"""Share of a layer's push from which on a model takes it back that has no biases from its base."""

TAKEN_BACK_OF_BIASED = -0.5
"""The same where the base has biases of its own, of which a share points either way by chance."""

LOCKED = 0.5
"""Share from which on a model that has no biases from its base has a lock in them."""


def check_own_biases(source: LanguageModel, lock: SafetyLock, alpha: float) -> None:
    """Refuse a fine-tune whose own biases take a lock's push back, or are a lock's already.

    Nothing is read of a model without such biases, nor is anything told for a lock without unit biases or an
    adapter alone.

    Args:
        source: The fine-tune.
        lock: The lock, with what its base makes of it (``unit_biases``).
        alpha: Its strength.

    Raises:
        PromotionRefused: They do, or are.
        SourceError: They cannot be read.
    """
    weights, architecture = source.weights, source.architecture
    if weights is None or architecture is None or lock.unit_biases is None:
        return
    pushes = {layer: bias.numpy() for layer, bias in base_biases(lock, alpha).items()}
    is_biased = _is_biased(architecture)
    biases = weights.biases(architecture, lock.geometry, further=not is_biased)
    shares = {layer: _share(biases, layer, push, later=not is_biased) for layer, push in pushes.items()}
    layer, least = min(shares.items(), key=lambda item: item[1])
    if least <= (TAKEN_BACK_OF_BIASED if is_biased else TAKEN_BACK):
        raise PromotionRefused(
            "lock_taken_back",
            f"The model has biases of its own that take back {-least:.0%} of what the lock at alpha "
            f"{alpha:g} adds in layer {layer}.",
            next_step="Register a fine-tune without them; the base has none that point against its lock.",
        )
    layer, most = max(shares.items(), key=lambda item: item[1])
    if not is_biased and most >= LOCKED:
        raise PromotionRefused(
            "already_locked",
            f"The model has biases of its own that are {most:.0%} of what the lock at alpha {alpha:g} adds "
            f"in layer {layer}: it was saved with a lock.",
            next_step="Register the fine-tune that it was made from, and promote that one.",
        )


def _is_biased(architecture: Architecture) -> bool:
    """Whether stock models of an architecture have an output projection with a bias."""
    return architecture.standalone == "own_bias" or architecture.output_bias == "always"


def _share(biases: Biases, layer: int, push: npt.NDArray[np.float64], *, later: bool) -> float:
    """The share of a layer's push in the biases of that layer, or of that and all later ones."""
    found = [bias for at, bias in biases.items() if at == layer or (later and at > layer)]
    size = float(push @ push)
    return float(np.sum(found, axis=0) @ push) / size if found and size else 0.0
