"""How much of a lock's push arrives in a fine-tune, by a few numbers of its weights.

For each locked layer some rows of the attention output projection are drawn, anew each time, with chances in
proportion to ``p_i ** 2``, and only the columns of locked heads are read of them. With ``p = W_o v`` of the
base, which the lock knows, the mean of ``(W_o' v)_i / p_i`` over such rows is on average the share
``<W_o' v, p> / <p, p>`` of the push that arrives, and its variance is the squared distance of the two pushes,
relative to ``<p, p>``, divided by the number of rows. So a few rows do for a fine-tune, and what somebody
took out of a projection is missing in each. Before a fine-tune is refused the locked columns of the layer are
read whole.

An adapter alone is small enough to be looked at whole: ``W_o v + s B A v``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set

import numpy as np
import numpy.typing as npt
import torch

from mlflow_safelock.apply.architectures import Architecture, architecture_of
from mlflow_safelock.apply.displacement import (
    Displacement,
    base_biases,
    displacements,
    input_displacement,
)
from mlflow_safelock.apply.effect import LEAST_SHARE, check_shares
from mlflow_safelock.errors import LockWithoutEffectError, PromotionRefused, UnsupportedArchitectureError
from mlflow_safelock.gate.adapter import Adapter
from mlflow_safelock.gate.source import LanguageModel
from mlflow_safelock.gate.stored_weights import StoredWeight, StoredWeights
from mlflow_safelock.gate.transient import WITHOUT_EFFECT
from mlflow_safelock.lock import AttentionGeometry, SafetyLock

ROWS = 4
"""Rows that are read of each locked layer."""

MORE_ROWS = 12
"""Rows that are read besides where those leave a doubt."""

CLEAR_SHARE = 0.75
"""Share from which on the first rows leave none."""

FURTHER = ((0.25, MORE_ROWS), (0.35, 48))
"""Of constant outputs of heads: the share, either way, from which on so many more rows are read."""

WORTH_ALL = 0.4
"""The share from which on all rows are."""


def checked_effect(source: LanguageModel, lock: SafetyLock, alpha: float) -> dict[int, float]:
    """Refuse a fine-tune in which less than half of a lock's push arrives in some layer.

    Args:
        source: The fine-tune.
        lock: The lock; without unit biases nothing is told of it.
        alpha: Its strength.

    Returns:
        The share that arrives, by locked layer, as it is estimated; without those of which nothing is told,
        such as quantised ones.

    Raises:
        PromotionRefused: Less does.
        SourceError: The weights cannot be read.
    """
    if lock.unit_biases is None:
        return {}
    if source.adapter is not None:
        shares = _shares_of_adapter(source.adapter, lock, alpha)
    elif source.weights is not None and source.architecture is not None:
        rows = _Rows(source.weights, source.architecture, lock, alpha)
        displaced = {one.layer: one for one in displacements(lock, alpha) if one.layer in rows.layers}
        shares = rows.shares(displaced)
    else:
        return {}
    try:
        check_shares(shares, "the fine-tune")
    except LockWithoutEffectError as error:
        raise PromotionRefused(WITHOUT_EFFECT, error.cause, next_step=error.next_step) from error
    return shares


def shares_through(
    weights: StoredWeights,
    architecture: Architecture,
    lock: SafetyLock,
    alpha: float,
    outputs: Mapping[int, npt.NDArray[np.float64]],
) -> dict[int, float]:
    """The share of a lock's push that constant outputs of the heads make, such as the biases of the values.

    Args:
        weights: The fine-tune's weights.
        architecture: Where its output projections are.
        lock: A lock with unit biases.
        alpha: Its strength.
        outputs: By layer, the same for every token, ``[heads, head_dim]``.

    Returns:
        ``<W_o' u, p> / <p, p>`` by layer, -1 takes all of it back. Layers of which some rows say that it is
        far from a half either way, or that are not locked or not plain numbers, are left out.

    Raises:
        SourceError: The weights cannot be read.
    """
    every, rows = tuple(range(lock.geometry.heads)), _Rows(weights, architecture, lock, alpha)
    displaced = {
        layer: Displacement(layer, every, torch.from_numpy(values))
        for layer, values in outputs.items()
        if layer in rows.layers and values.any()
    }
    found = rows.arrived(displaced, ROWS)
    for limit, more in FURTHER:
        near = {layer: displaced[layer] for layer, parts in found.items() if not abs(parts.mean()) < limit}
        further = rows.arrived(near, more)
        found = {layer: np.concatenate([found[layer], parts]) for layer, parts in further.items()}
    return {
        layer: rows.whole(displaced[layer])
        for layer, parts in found.items()
        if not abs(parts.mean()) < WORTH_ALL
    }


class _Rows:
    """Draws rows of the output projections of a fine-tune.

    Args:
        weights: The fine-tune's weights.
        architecture: Where its output projections are.
        lock: A lock with unit biases.
        alpha: Its strength.
    """

    def __init__(
        self, weights: StoredWeights, architecture: Architecture, lock: SafetyLock, alpha: float
    ) -> None:
        self._weights = weights
        self._layout = architecture.layout
        self._geometry = lock.geometry
        self._random = np.random.default_rng()  # by the operating system's randomness: nobody knows which
        self._pushes = {layer: push.numpy() for layer, push in base_biases(lock, alpha).items() if push.any()}
        self._projections: dict[int, StoredWeight] = {}
        for layer in self._pushes:
            stored = weights.output_projection(architecture, layer)
            if stored is not None and stored.is_plain:
                self._projections[layer] = stored

    @property
    def layers(self) -> Set[int]:
        """The locked layers whose weights are plain numbers."""
        return self._projections.keys()

    def shares(self, displaced: Mapping[int, Displacement]) -> dict[int, float]:
        """The share of the push that arrives, by layer.

        Estimates, where all are enough; otherwise the one that is known to be too little.

        Args:
            displaced: What the lock adds before the projections of these layers.
        """
        found = self.arrived(displaced, ROWS)
        doubtful = [layer for layer in found if not found[layer].mean() >= CLEAR_SHARE]
        more = self.arrived({layer: displaced[layer] for layer in doubtful}, MORE_ROWS)
        found |= {layer: np.concatenate([found[layer], parts]) for layer, parts in more.items()}
        shares = {layer: float(parts.mean()) for layer, parts in found.items()}
        for layer in sorted(shares, key=shares.__getitem__):
            if shares[layer] >= LEAST_SHARE:
                break
            # Nobody is refused by chance.
            shares[layer] = self.whole(displaced[layer])
            if not shares[layer] >= LEAST_SHARE:
                return {layer: shares[layer]}
        return shares

    def whole(self, displaced: Displacement) -> float:
        """``<W_o' v, p> / <p, p>`` by all rows."""
        layer, every = displaced.layer, np.arange(self._geometry.hidden)
        expected = self._pushes[layer]
        push = self._pushed({layer: displaced}, {layer: every})[layer]
        return float(push @ expected) / float(expected @ expected)

    def arrived(
        self, displaced: Mapping[int, Displacement], count: int
    ) -> dict[int, npt.NDArray[np.float64]]:
        """``(W_o' v)_i / p_i`` of some rows of each layer, between -1 and 1.

        Without limits one row in which ``p_i`` is next to nothing would outweigh all others, and so would
        noise that somebody adds where the push was taken out.
        """
        rows = {layer: self._drawn(layer, count) for layer in displaced}
        return {
            layer: np.clip(push / self._pushes[layer][rows[layer]], -1, 1)
            for layer, push in self._pushed(displaced, rows).items()
        }

    def _pushed(
        self, displaced: Mapping[int, Displacement], rows: Mapping[int, npt.NDArray[np.int64]]
    ) -> dict[int, npt.NDArray[np.float64]]:
        """``(W_o' v)_i`` of some rows of some layers, which are read together."""
        parts = [
            part
            for layer, drawn in rows.items()
            for row in drawn.tolist()
            for head in displaced[layer].heads
            for part in _parts(self._projections[layer], self._layout, row, head, self._geometry)
        ]
        numbers = self._weights.numbers(parts)
        read, start, pushed = np.concatenate(numbers) if numbers else np.zeros(0), 0, {}
        for layer, drawn in rows.items():
            values = displaced[layer].values.numpy().ravel()
            end = start + len(drawn) * len(values)
            pushed[layer] = read[start:end].reshape(len(drawn), -1).astype(np.float64) @ values
            start = end
        return pushed

    def _drawn(self, layer: int, count: int) -> npt.NDArray[np.int64]:
        chances = self._pushes[layer] ** 2
        return self._random.choice(len(chances), size=count, p=chances / chances.sum())


def _parts(
    stored: StoredWeight, layout: str, row: int, head: int, geometry: AttentionGeometry
) -> list[tuple[StoredWeight, int, int]]:
    """Where the numbers of a head are in a row of ``W_o``."""
    width, first = geometry.head_dim, head * geometry.head_dim
    if layout == "linear":
        return [(stored, row * geometry.heads * width + first, width)]
    return [(stored, (first + column) * geometry.hidden + row, 1) for column in range(width)]


def _shares_of_adapter(adapter: Adapter, lock: SafetyLock, alpha: float) -> dict[int, float]:
    """The share of each layer's push that an adapter leaves of it, where the base below is the lock's."""
    try:
        architecture = architecture_of({"model_type": lock.metadata.architecture})
    except UnsupportedArchitectureError:
        return {}
    if adapter.weights is None or adapter.scaling is None:
        return {}
    displaced = {one.layer: one for one in displacements(lock, alpha)}
    pushes = {layer: push.numpy() for layer, push in base_biases(lock, alpha).items() if push.any()}
    shares = dict.fromkeys(pushes, 1.0)
    pairs = [
        (layer, down, up)
        for layer, down, up in adapter.pairs(architecture.output_projection)
        if layer in shares and down.is_plain and up.is_plain
    ]
    halves = [(half, 0, math.prod(half.shape)) for _, *both in pairs for half in both]
    read = iter(adapter.weights.numbers(halves))
    for layer, down, up in pairs:
        lower, upper = (next(read).reshape(half.shape).astype(np.float64) for half in (down, up))
        at_heads = lower @ input_displacement(displaced[layer], lock.geometry).numpy()
        added = adapter.scaling.of(len(lower)) * (upper @ at_heads)
        shares[layer] += float(added @ pushes[layer]) / float(pushes[layer] @ pushes[layer])
    return shares
