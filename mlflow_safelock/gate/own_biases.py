"""What a fine-tune's own biases have of a lock's push: one that takes it back would be served as if unlocked.

A lock is a bias ``W_o v_l`` in each locked layer (arXiv 2410.10343 adds ``v_l`` before the projection, which
is the same), and whoever has it can give a fine-tune the same bias with the other sign. For each locked layer
this tells the share of its push that the model has in its own biases already, -1 takes it back and +1 is the
lock itself:

* ``<b, p_l> / <p_l, p_l>`` of the biases ``b`` that are added to the residual stream, with the push ``p_l``;
* ``<u, v_l> / <v_l, v_l>`` of the biases ``u`` of the values, in the locked heads: the weights of attention
  add up to 1, so that a head's output has the bias of its values whole;
* ``<W_o u, p_l> / <p_l, p_l>`` of the same in all heads, where rows of ``W_o`` say that it may be a half: the
  push can be taken back by other heads, or by what is orthogonal to ``v_l``.

A base may have biases of its own, of which a share points either way by chance; so half of the push is what
counts. This finds a bias that was put there, and no fine-tuning that undoes a lock in other ways.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mlflow_safelock.apply.architectures import Architecture
from mlflow_safelock.apply.displacement import base_biases, displacements
from mlflow_safelock.errors import PromotionRefused
from mlflow_safelock.gate.effect import shares_through
from mlflow_safelock.gate.source import LanguageModel
from mlflow_safelock.gate.stored_weights import StoredWeights
from mlflow_safelock.lock import AttentionGeometry, SafetyLock

TAKEN_BACK, LOCKED = -0.5, 0.5
"""Shares of a layer's push from which on a model takes it back, and has a lock in its biases."""

_WAY_OUT = "If its base has such biases itself, set 'own_biases: ignore' in the policy's gate for it."

VALUES = "v_proj"
"""Name of the projection of values, beside that of the output."""

FEED_FORWARD = (
    "mlp.down_proj",
    "mlp.c_proj",
    "mlp.fc2",
    "fc2",
    "mlp.dense_4h_to_h",
    "mlp.fc_out",
    "ffn.down_proj",
)
"""Paths of the projections by which the feed-forward part of a layer adds to the residual stream."""


def check_own_biases(
    source: LanguageModel, lock: SafetyLock, alpha: float, arriving: Mapping[int, float]
) -> None:
    """Refuse a fine-tune whose own biases take a lock's push back, or are a lock's already.

    Nothing is read of a model without such biases. Nothing is told for a lock without unit biases.

    Args:
        source: The fine-tune.
        lock: The lock, with what its base makes of it (``unit_biases``).
        alpha: Its strength.
        arriving: The share of each layer's push that arrives as the weights are, where that is known; what
            is missing of it counts as taken back.

    Raises:
        PromotionRefused: They do, or are; or it is an adapter with biases, which are added to those of a base
            that is not here.
        SourceError: They cannot be read.
    """
    if source.adapter is not None and source.adapter.biases:
        raise PromotionRefused(
            "lock_taken_back",
            f"The adapter has biases ({source.adapter.biases[0]!r}), which may take back what a lock adds, "
            "and it is promoted without its base, so that this cannot be told.",
            next_step="Train it without biases, or merge it (model.merge_and_unload()) and log that, or set "
            "'own_biases: ignore' in the policy's gate for it.",
        )
    weights, architecture = source.weights, source.architecture
    if weights is None or architecture is None or lock.unit_biases is None:
        return
    shares = _shares(weights, architecture, lock, alpha)
    missing = {layer: min(arriving.get(layer, 1.0), 1.0) - 1.0 for layer in shares}
    least, layer = min((min(found) + missing[layer], layer) for layer, found in shares.items())
    taken = min(shares[layer])
    # Not without a bias that takes something back: of what arrives alone another check decides.
    if least <= TAKEN_BACK and taken < 0:
        arrives = f", of which {1 + missing[layer]:.0%} arrives" if missing[layer] else ""
        raise PromotionRefused(
            "lock_taken_back",
            f"The model has biases of its own that take back {-taken:.0%} of what the lock at alpha "
            f"{alpha:g} adds in layer {layer}{arrives}.",
            next_step=f"Register a fine-tune without them. {_WAY_OUT}",
        )
    most, layer = max((max(found), layer) for layer, found in shares.items())
    if most >= LOCKED:
        raise PromotionRefused(
            "already_locked",
            f"The model has biases of its own that are {most:.0%} of what the lock at alpha {alpha:g} adds "
            f"in layer {layer}, as if it was saved with a lock.",
            next_step=f"Register the fine-tune that it was made from, and promote that one. {_WAY_OUT}",
        )


def _shares(
    weights: StoredWeights, architecture: Architecture, lock: SafetyLock, alpha: float
) -> dict[int, tuple[float, ...]]:
    """The shares of each locked layer's push that a model has in its own biases, by kind, and in all of them.

    A bias may be stored that the model does not have, so that it counts for nothing what others make up for.
    """
    by_flag = architecture.standalone == "flag"
    output = architecture.output_projection
    of_values = f"{output.rpartition('.')[0]}.{VALUES}"
    biases = weights.biases(architecture, lock.geometry, (output, of_values, *FEED_FORWARD))
    heads = {displaced.layer: displaced for displaced in displacements(lock, alpha)}
    outputs = {
        layer: _of_heads(biases[layer][of_values], lock.geometry)
        for layer in heads.keys() & biases.keys()
        if of_values in biases[layer] and biases[layer][of_values].size % lock.geometry.head_dim == 0
    }
    through = shares_through(weights, architecture, lock, alpha, outputs)
    shares = {}
    for layer, push in base_biases(lock, alpha).items():
        found: dict[str, float] = {}
        # Where models have biases but by a flag, those of later layers may make up for it as well.
        for at in (at for at in biases if at == layer or (by_flag and at > layer)):
            for path, values in biases[at].items():
                if path != of_values and values.shape == push.shape:
                    found[path] = found.get(path, 0.0) + _share(values, push.numpy())
        # Two ways to look at the same biases: one of them counts in the sum.
        of_the_values = [through[layer]] if layer in through else []
        if layer in outputs:
            own = outputs[layer][list(heads[layer].heads)]
            of_the_values.append(_share(own, heads[layer].values.numpy()))
        others = sum(found.values())
        sums = [others + share for share in of_the_values or [0.0]]
        shares[layer] = (*sums, *found.values(), *of_the_values)
    return shares


def _share(own: npt.NDArray[np.float64], push: npt.NDArray[np.float64]) -> float:
    size = float(np.sum(push * push))
    return float(np.sum(own * push)) / size if size else 0.0


def _of_heads(values: npt.NDArray[np.float64], geometry: AttentionGeometry) -> npt.NDArray[np.float64]:
    """What the biases of the values are in the outputs of the query heads, ``[heads, head_dim]``.

    Query heads that are neighbours share a key/value head.
    """
    of_each = values.reshape(-1, geometry.head_dim)
    shared_by = max(1, geometry.heads // len(of_each))
    return np.array([of_each[min(head // shared_by, len(of_each) - 1)] for head in range(geometry.heads)])
