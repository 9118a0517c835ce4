"""What a model's own biases have of a lock's push: one that takes it back would be served as if unlocked.

A lock is a bias ``W_o v_l`` in each locked layer (arXiv 2410.10343 adds ``v_l`` before the projection, which
is the same), and whoever has it can give a fine-tune the same bias with the other sign. For each locked layer
this tells the share of its push that a model has in its own biases already, -1 takes it back and +1 is the
lock itself:

* ``<b, p_l> / <p_l, p_l>`` of the biases ``b`` that are added to the residual stream, with the push ``p_l``;
* ``<u, v_l> / <v_l, v_l>`` of the biases ``u`` of the values, in the locked heads: the weights of attention
  add up to 1, so that a head's output has the bias of its values whole;
* ``<W_o u, p_l> / <p_l, p_l>`` of the same in all heads: the push can be taken back by other heads, or by
  what is orthogonal to ``v_l``.

A base may have biases of its own, of which a share points either way by chance; so half of the push is what
counts. This finds a bias that was put there, and no fine-tuning that undoes a lock in other ways.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlflow_safelock.apply.architectures import Architecture
from mlflow_safelock.apply.displacement import base_biases, displacements
from mlflow_safelock.lock import AttentionGeometry, SafetyLock

TAKEN_BACK, LOCKED = -0.5, 0.5
"""Shares of a layer's push from which on a model takes it back, and has a lock in its biases."""

VALUES = "v_proj"
"""Name of the projection of values, beside that of the output."""

FEED_FORWARD = (
    "mlp.down_proj",
    "mlp.experts.down_proj",
    "mlp.c_proj",
    "mlp.fc2",
    "fc2",
    "mlp.dense_4h_to_h",
    "mlp.fc_out",
    "ffn.down_proj",
)
"""Paths of the projections by which the feed-forward part of a layer adds to the residual stream."""

Biases = Mapping[int, Mapping[str, npt.NDArray[np.float64]]]
"""By layer, and by the path of the module inside it: ``[outputs]``, and of experts ``[experts, outputs]``."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a model's own biases.

    Attributes:
        is_lock: Whether they are half of a lock already; otherwise they take half of it back.
        layer: In which layer.
        what: What they do, for an error.
    """

    is_lock: bool
    layer: int
    what: str


def biased_paths(architecture: Architecture) -> tuple[str, ...]:
    """The paths inside a layer of the modules whose biases are looked at."""
    return architecture.output_projection, _values_path(architecture), *FEED_FORWARD


def head_outputs(
    biases: Biases, architecture: Architecture, geometry: AttentionGeometry
) -> dict[int, npt.NDArray[np.float64]]:
    """What the biases of the values are in the outputs of the query heads.

    Query heads that are neighbours share a key/value head.

    Returns:
        ``[heads, head_dim]`` by layer, of those that have such biases.
    """
    found = {}
    for layer, inside in biases.items():
        values = inside.get(_values_path(architecture))
        if values is not None and values.size and values.size % geometry.head_dim == 0:
            of_each = values.reshape(-1, geometry.head_dim)
            shared_by = max(1, geometry.heads // len(of_each))
            heads = [min(head // shared_by, len(of_each) - 1) for head in range(geometry.heads)]
            found[layer] = of_each[heads]
    return found


def added_behind(
    biases: Biases, architecture: Architecture, geometry: AttentionGeometry
) -> dict[int, list[npt.NDArray[np.float64]]]:
    """The biases that each layer adds behind its heads, ``[hidden]``: the output projection's, and others."""
    return {
        layer: [
            inside[path]
            for path in (architecture.output_projection, *FEED_FORWARD)
            if path in inside and inside[path].shape == (geometry.hidden,)
        ]
        for layer, inside in biases.items()
    }


def fault_of(
    biases: Biases,
    through: Mapping[int, float],
    arriving: Mapping[int, float],
    architecture: Architecture,
    lock: SafetyLock,
    alpha: float,
) -> Fault | None:
    """Tell whether a model's own biases take a lock's push back, or are a lock's already.

    Args:
        biases: Those of ``biased_paths``.
        through: ``<W_o u, p_l> / <p_l, p_l>`` by layer, where it is known, of the biases of the values.
        arriving: The share of each layer's push that arrives as the weights are, where that is known; what
            is missing of it counts as taken back.
        architecture: The model's architecture.
        lock: A lock with unit biases.
        alpha: Its strength.

    Returns:
        What is worst; ``None`` where nothing reaches half of the push.
    """
    shares = _shares(biases, through, architecture, lock, alpha)
    missing = {layer: min(arriving.get(layer, 1.0), 1.0) - 1.0 for layer in shares}
    least, layer = min((taken + missing[layer], layer) for layer, (taken, _) in shares.items())
    taken, _ = shares[layer]
    # Not without a bias that takes something back: of what arrives alone another check decides.
    if least <= TAKEN_BACK and taken < 0:
        arrives = f", of which {1 + missing[layer]:.0%} arrives" if round(missing[layer], 2) else ""
        much = f"{-taken:.0%}" if math.isfinite(taken) else "all, in numbers that are not finite,"
        return Fault(
            False,
            layer,
            f"take back {much} of what the lock at alpha {alpha:g} adds in layer {layer}{arrives}",
        )
    most, layer = max((along, layer) for layer, (_, along) in shares.items())
    if most >= LOCKED:
        return Fault(True, layer, f"are {most:.0%} of what the lock at alpha {alpha:g} adds in layer {layer}")
    return None


def _shares(
    biases: Biases, through: Mapping[int, float], architecture: Architecture, lock: SafetyLock, alpha: float
) -> dict[int, tuple[float, float]]:
    """What takes back of each locked layer's push, 0 or less, and what is along it, 0 or more.

    A bias may be stored that the model does not have, so that no kind makes up for another.
    """
    # Where models have biases but by a flag, those of later layers may take it back as well.
    by_flag = architecture.standalone == "flag"
    of_values = _values_path(architecture)
    outputs = head_outputs(biases, architecture, lock.geometry)
    pushed = {displaced.layer: displaced for displaced in displacements(lock, alpha)}
    found = {}
    for layer, push in base_biases(lock, alpha).items():
        later = sorted(at for at in biases if at == layer or (by_flag and at > layer))
        kinds = {
            path: _reached((biases[at][path] for at in later if path in biases[at]), push.numpy())
            for path in (architecture.output_projection, *FEED_FORWARD)
        }
        # Ways to look at the same biases: the worst of them counts.
        ways = [_told(through[layer])] if layer in through else []
        if layer in outputs:
            own = outputs[layer][list(pushed[layer].heads)]
            ways.append(_share(own, pushed[layer].values.numpy()))
        kinds[of_values] = min(ways, default=0.0), max(ways, default=0.0)
        against = sum(min(least, 0.0) for least, _ in kinds.values())
        along = sum(max(most, 0.0) for _, most in kinds.values())
        found[layer] = against, along
    return found


def _reached(biases: Iterable[npt.NDArray[np.float64]], push: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The least and the most of a push that biases have, layer after layer: no later one makes up for it."""
    least, most, low, high = 0.0, 0.0, 0.0, 0.0
    for bias in biases:
        if bias.shape[-1:] == push.shape:
            shares = [
                _share(one, push) for one in bias.reshape(-1, len(push))
            ]  # any of the experts may be it
            low, high = low + min(shares), high + max(shares)
            least, most = min(least, low), max(most, high)
    return least, most


def _share(own: npt.NDArray[np.float64], push: npt.NDArray[np.float64]) -> float:
    size = float(np.sum(push * push))
    return _told(float(np.sum(own * push)) / size) if size else 0.0


def _told(share: float) -> float:
    """A share; of numbers that are none it is that all is taken back, and more."""
    return share if math.isfinite(share) else -math.inf


def _values_path(architecture: Architecture) -> str:
    parent, dot, _ = architecture.output_projection.rpartition(".")
    return f"{parent}{dot}{VALUES}"
