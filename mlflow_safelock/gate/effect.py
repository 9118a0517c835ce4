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
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate

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
from mlflow_safelock.lock import SafetyLock

ROWS = 4
"""Rows that are read of each locked layer."""

MORE_ROWS = 12
"""Rows that are read besides where those leave a doubt."""

CLEAR_SHARE = 0.75
"""Share from which on the first rows leave none."""

STAGES = ((ROWS, 28.0), (12, 6.2), (48, 4.7), (192, 4.5))
"""Of constants beside a push: how many rows are read, and then how many more, and how many standard errors
their mean may be off: what one in 100,000 is, by Student's distribution."""

FAR = 0.4
"""The share, either way, that constants are told to be below by some rows, or all are read."""


@dataclass(frozen=True)
class Arriving:
    """How much of a lock's push arrives in each locked layer.

    Attributes:
        shares: As it is estimated, by layer; without those of which nothing is told, such as quantised ones.
        exactly: Gives it for one of these layers by all there is to read.
    """

    shares: Mapping[int, float]
    exactly: Callable[[int], float]


NOTHING_TOLD = Arriving({}, lambda _layer: math.nan)


def checked_effect(source: LanguageModel, lock: SafetyLock, alpha: float) -> Arriving:
    """Refuse a fine-tune in which less than half of a lock's push arrives in some layer.

    Args:
        source: The fine-tune.
        lock: The lock; without unit biases nothing is told of it.
        alpha: Its strength.

    Raises:
        PromotionRefused: Less does.
        SourceError: The weights cannot be read, or an adapter changes one projection twice.
    """
    if lock.unit_biases is None:
        return NOTHING_TOLD
    if source.adapter is not None:
        shares = _shares_of_adapter(source.adapter, lock, alpha)
        arriving = Arriving(shares, shares.__getitem__)
    elif source.weights is not None and source.architecture is not None:
        rows = _Rows(source.weights, source.architecture, lock, alpha)
        displaced = {one.layer: one for one in displacements(lock, alpha) if one.layer in rows.layers}
        arriving = Arriving(rows.shares(displaced), lambda layer: rows.whole(displaced[layer]))
    else:
        return NOTHING_TOLD
    try:
        check_shares(arriving.shares, "the fine-tune")
    except LockWithoutEffectError as error:
        raise PromotionRefused(WITHOUT_EFFECT, error.cause, next_step=error.next_step) from error
    return arriving


def shares_through(
    weights: StoredWeights,
    architecture: Architecture,
    lock: SafetyLock,
    alpha: float,
    outputs: Mapping[int, npt.NDArray[np.float64]],
    behind: Mapping[int, Sequence[npt.NDArray[np.float64]]],
) -> dict[int, float]:
    """The share of a lock's push that constant outputs of the heads make, such as the biases of the values.

    Rows tell where that is far from a half. What they do not tell is a share that is made of the numbers of a
    few rows, which may not be drawn; but biases behind the projection that leave nothing of it but the push
    taken back are then unlike that in all others. So rows are looked at with these biases, too.

    Args:
        weights: The fine-tune's weights.
        architecture: Where its output projections are.
        lock: A lock with unit biases.
        alpha: Its strength.
        outputs: By layer, the same for every token, ``[heads, head_dim]``.
        behind: By layer, ``[hidden]`` each: what is added there, one after the other.

    Returns:
        ``<W_o' u, p> / <p, p>`` by layer, -1 takes all of it back: exactly, by all rows. Layers are left out
        of which some rows say that it is far from a half either way, with and without those biases, or that
        are not locked, or not plain numbers.

    Raises:
        SourceError: The weights cannot be read.
    """
    every, rows = tuple(range(lock.geometry.heads)), _Rows(weights, architecture, lock, alpha)
    displaced = {
        layer: Displacement(layer, every, torch.from_numpy(values))
        for layer, values in outputs.items()
        if layer in rows.layers and values.any()
    }
    found: dict[int, npt.NDArray[np.float64]] = {}
    undecided = dict(displaced)
    for count, errors in STAGES:
        for layer, (drawn, ratios) in rows.ratios(undecided, count).items():
            parts = rows.with_biases(layer, drawn, ratios, behind.get(layer, ()))
            found[layer] = np.concatenate([found[layer], parts], axis=1) if layer in found else parts
        undecided = {layer: one for layer, one in undecided.items() if not _are_far(found[layer], errors)}
    return {layer: rows.whole(one) for layer, one in undecided.items()}


def _are_far(parts: npt.NDArray[np.float64], errors: float) -> bool:
    """Whether the means of ``[kinds, rows]`` are surely far from a half."""
    spread = parts.std(axis=1, ddof=1) / math.sqrt(parts.shape[1])
    return bool((np.abs(parts.mean(axis=1)) + errors * spread < FAR).all())


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
        return self._share(displaced.layer, self._all(displaced))

    def arrived(
        self, displaced: Mapping[int, Displacement], count: int
    ) -> dict[int, npt.NDArray[np.float64]]:
        """``(W_o' v)_i / p_i`` of some rows of each layer, between -1 and 1.

        Without limits one row in which ``p_i`` is next to nothing would outweigh all others, and so would
        noise that somebody adds where the push was taken out.
        """
        found = self.ratios(displaced, count)
        return {layer: np.clip(ratios, -1, 1) for layer, (_, ratios) in found.items()}

    def ratios(
        self, displaced: Mapping[int, Displacement], count: int
    ) -> dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
        """Some rows of each layer, and their ``(W_o' v)_i / p_i``."""
        rows = {layer: self._drawn(layer, count) for layer in displaced}
        return {
            layer: (rows[layer], push / self._pushes[layer][rows[layer]])
            for layer, push in self._pushed(displaced, rows).items()
        }

    def with_biases(
        self,
        layer: int,
        rows: npt.NDArray[np.int64],
        ratios: npt.NDArray[np.float64],
        behind: Sequence[npt.NDArray[np.float64]],
    ) -> npt.NDArray[np.float64]:
        """Ratios, and what they are with one bias after the other, ``[1 + len(behind), rows]``."""
        added = (bias[rows] / self._pushes[layer][rows] for bias in behind)
        return np.stack(list(accumulate(added, initial=ratios)))

    def _share(self, layer: int, push: npt.NDArray[np.float64]) -> float:
        expected = self._pushes[layer]
        return float(push @ expected) / float(expected @ expected)

    def _all(self, displaced: Displacement) -> npt.NDArray[np.float64]:
        every = np.arange(self._geometry.hidden)
        return self._pushed({displaced.layer: displaced}, {displaced.layer: every})[displaced.layer]

    def _pushed(
        self, displaced: Mapping[int, Displacement], rows: Mapping[int, npt.NDArray[np.int64]]
    ) -> dict[int, npt.NDArray[np.float64]]:
        """``(W_o' v)_i`` of some rows of some layers, which are read together."""
        if self._layout != "linear":
            return self._pushed_by_columns(displaced, rows)
        width, across = self._geometry.head_dim, self._geometry.heads * self._geometry.head_dim
        parts = [
            (self._projections[layer], row * across + head * width, width)
            for layer, drawn in rows.items()
            for row in drawn.tolist()
            for head in displaced[layer].heads
        ]
        numbers = self._weights.numbers(parts)
        read, start, pushed = np.concatenate(numbers) if numbers else np.zeros(0), 0, {}
        for layer, drawn in rows.items():
            values = displaced[layer].values.numpy().ravel()
            end = start + len(drawn) * len(values)
            pushed[layer] = read[start:end].reshape(len(drawn), -1).astype(np.float64) @ values
            start = end
        return pushed

    def _pushed_by_columns(
        self, displaced: Mapping[int, Displacement], rows: Mapping[int, npt.NDArray[np.int64]]
    ) -> dict[int, npt.NDArray[np.float64]]:
        """The same where the columns of a head are stored one after the other: they are read whole."""
        hidden, width = self._geometry.hidden, self._geometry.head_dim
        pushed = {layer: np.zeros(hidden) for layer in rows}
        parts = [
            (self._projections[layer], head * width * hidden, width * hidden)
            for layer in rows
            for head in displaced[layer].heads
        ]
        read = iter(self._weights.numbers(parts))
        for layer in rows:
            for values in displaced[layer].values.numpy():
                pushed[layer] += values @ next(read).reshape(width, hidden).astype(np.float64)
        return {layer: pushed[layer][drawn] for layer, drawn in rows.items()}

    def _drawn(self, layer: int, count: int) -> npt.NDArray[np.int64]:
        chances = self._pushes[layer] ** 2
        return self._random.choice(len(chances), size=count, p=chances / chances.sum())


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
    updates = adapter.updates_of(architecture.output_projection)
    shares = {layer: 1.0 for layer in pushes if layer not in updates.untold}
    pairs = [pair for pair in updates.pairs if pair[0] in shares]
    halves = [(half, 0, math.prod(half.shape)) for _, *both in pairs for half in both]
    read = iter(adapter.weights.numbers(halves))
    for layer, down, up in pairs:
        lower, upper = (next(read).reshape(half.shape).astype(np.float64) for half in (down, up))
        at_heads = lower @ input_displacement(displaced[layer], lock.geometry).numpy()
        added = adapter.scaling.of(len(lower)) * (upper @ at_heads)
        shares[layer] += float(added @ pushes[layer]) / float(pushes[layer] @ pushes[layer])
    return shares
