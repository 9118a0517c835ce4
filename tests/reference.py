"""The method in float64 and numpy, one head at a time, so that it can be read beside the paper.

Nothing is shared with the package: this is what its numbers are compared with, on data that the tests make up
themselves. ``L`` layers, ``H`` heads in a layer, ``D`` numbers to a head, ``M`` the model's width.

Labels are 1 where a row comes from a safe answer, 0 where it comes from an unsafe one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """Activations ``[rows, L, H, D]``, labels ``[rows]``, a split, and projections ``[L, M, H * D]``."""

    activations: np.ndarray
    labels: np.ndarray
    train_rows: np.ndarray
    val_rows: np.ndarray
    o_proj: np.ndarray


def sample(
    seed: int = 0,
    pairs: int = 30,
    last_tokens: int = 4,
    layers: int = 3,
    heads: int = 5,
    dim: int = 6,
    width: int = 24,
) -> Sample:
    """Made-up activations in which heads know the difference more or less well, rows pair by pair."""
    rng = np.random.default_rng(seed)
    labels = np.array([1] * last_tokens + [0] * last_tokens).tolist() * pairs
    labels = np.array(labels)
    rows = len(labels)
    activations = rng.standard_normal((rows, layers, heads, dim))
    for layer in range(layers):
        for head in range(heads):
            difference = rng.standard_normal(dim)
            separation = 2.5 * rng.random()
            activations[labels == 1, layer, head] += separation * difference / np.linalg.norm(difference)
            activations[:, layer, head] += rng.standard_normal(dim)  # heads do not sit around zero
    shuffled = rng.permutation(rows)
    cut = rows * 6 // 10
    return Sample(
        activations.astype(np.float32),
        labels,
        np.sort(shuffled[:cut]),
        np.sort(shuffled[cut:]),
        rng.standard_normal((layers, width, heads * dim)).astype(np.float32) / 5,
    )


def logistic_regression(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights and intercept of the regression with ``|w|^2 / 2`` for a penalty, by Newton's method."""
    design = np.column_stack([rows.astype(np.float64), np.ones(len(rows))])
    ridge = np.append(np.ones(rows.shape[1]), 0.0)

    def loss(point: np.ndarray) -> float:
        logits = design @ point
        return float(np.logaddexp(0.0, np.where(labels == 1, -logits, logits)).sum() + ridge @ point**2 / 2)

    point = np.zeros(design.shape[1])
    for _ in range(200):
        guess = 1.0 / (1.0 + np.exp(-(design @ point)))
        slope = design.T @ (guess - labels) + ridge * point
        if np.abs(slope).max() < 1e-9:
            return point[:-1], float(point[-1])
        curvature = design.T @ (design * (guess * (1.0 - guess))[:, None]) + np.diag(ridge)
        step = np.linalg.solve(curvature, slope)
        while loss(point - step) > loss(point) + 1e-12:
            step /= 2.0
        point = point - step
    raise AssertionError("Newton's method did not arrive")


def accuracy(rows: np.ndarray, labels: np.ndarray, weights: np.ndarray, intercept: float) -> float:
    """Share of the rows that lie on their own side."""
    return float(np.mean((rows.astype(np.float64) @ weights + intercept > 0.0) == (labels == 1)))


def probe_scores(
    activations: np.ndarray, labels: np.ndarray, train_rows: np.ndarray, val_rows: np.ndarray
) -> np.ndarray:
    """Score of every head ``[L, H]``: the mean of its probe's accuracy on train and on validation rows."""
    _, layers, heads, _ = activations.shape
    scores = np.zeros((layers, heads))
    for layer in range(layers):
        for head in range(heads):
            rows = activations[:, layer, head]
            probe = logistic_regression(rows[train_rows], labels[train_rows])
            train = accuracy(rows[train_rows], labels[train_rows], *probe)
            validation = accuracy(rows[val_rows], labels[val_rows], *probe)
            scores[layer, head] = (train + validation) / 2.0
    return scores


def top_heads(scores: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The best ``(layer, head)``, best first; of equal ones the lower layer, then the lower head."""
    everywhere = [(layer, head) for layer in range(scores.shape[0]) for head in range(scores.shape[1])]
    # Twelve digits: two scores that are one fraction may differ in their last bits.
    return sorted(everywhere, key=lambda place: (-round(float(scores[place]), 12), *place))[:count]


def direction_and_std(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """From the mean unsafe row to the mean safe row, length one; and how far all rows spread along it."""
    rows = rows.astype(np.float64)
    towards_safe = rows[labels == 1].mean(axis=0) - rows[labels == 0].mean(axis=0)
    direction = towards_safe / np.sqrt((towards_safe**2).sum())
    along = np.array([row @ direction for row in rows])
    return direction, float(np.sqrt(((along - along.mean()) ** 2).mean()))


def displacement(
    layer: int, heads: dict[tuple[int, int], tuple[np.ndarray, float]], count: int, dim: int, alpha: float
) -> np.ndarray:
    """What the lock adds to the input of a layer's output projection ``[H * D]``."""
    added = np.zeros((count, dim))
    for (locked_layer, head), (direction, std) in heads.items():
        if locked_layer == layer:
            added[head] = alpha * std * direction
    return added.reshape(-1)


def bias(
    o_proj: np.ndarray, heads: dict[tuple[int, int], tuple[np.ndarray, float]], dim: int, alpha: float
) -> np.ndarray:
    """The bias of every layer's output projection ``[L, M]``: the projection of what the lock adds.

    ``heads`` gives direction and std for every locked ``(layer, head)``.
    """
    count = o_proj.shape[2] // dim
    return np.stack(
        [
            o_proj[layer].astype(np.float64) @ displacement(layer, heads, count, dim, alpha)
            for layer in range(o_proj.shape[0])
        ]
    )
