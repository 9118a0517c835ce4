"""A probe for every head: all at once, or one scikit-learn fit after the other."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import starmap

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from benchmarks.harness import Contender, Settings, compare
from benchmarks.results import Row
from mlflow_safelock.forging import ProbeScores, RowSplit, given_split, score_heads

HEADS_OF_LAYER = 32
HEAD_DIM = 128
TRAIN_ROWS, VALIDATION_ROWS = 600, 400
"""100 pairs of answers with 5 tokens each, split 60 to 40 (METHOD, forge step 4)."""

TELLING_HEADS = 24
"""How many heads tell safe from unsafe; as many are to be found."""


def run(settings: Settings) -> Iterator[Row]:
    """Probe many heads, of rows that are easy for an iterative solver and of rows as they are in models."""
    layers = 1 if settings.quick else max(1, round(settings.probe_heads / HEADS_OF_LAYER))
    for rows, decay in (("uncorrelated rows", 0.0), ("rows whose spread falls as 1/sqrt(k)", 0.5)):
        for threads in (None, 1):
            yield _compare(rows, layers, decay, threads, settings)


def _compare(rows: str, layers: int, decay: float, threads: int | None, settings: Settings) -> Row:
    """Compare with scikit-learn as it comes, or held to a number of threads.

    Its small products are slower on two cores than on one, and very much so when the cores are busy: so the
    loop as it comes is what people run, and the one on a single thread what scikit-learn could do.
    """
    way = "" if threads is None else ", one thread"
    heads = layers * HEADS_OF_LAYER
    activations, labels = _made_activations(layers, decay)
    split = _split()
    results: dict[str, ProbeScores] = {}
    operations = 2 * heads * TRAIN_ROWS * HEAD_DIM**2
    row = compare(
        "probes",
        f"{heads} heads of {TRAIN_ROWS} x {HEAD_DIM} ({VALIDATION_ROWS} rows to validate), {rows}{way}",
        ours=Contender(
            "all heads at once, to the optimum",
            lambda: score_heads(activations, labels, split),
            lambda scores: results.update(ours=scores),
        ),
        theirs=Contender(
            f"scikit-learn, head by head, to its own tolerance{way}",
            lambda: _score_one_by_one(activations, labels, split, threads),
            lambda scores: results.update(theirs=scores),
        ),
        limit=Contender(
            f"one float32 Hessian for each head: {operations / 1e9:.3g} GFLOP",
            lambda: _one_hessian_each(heads),
        ),
        repetitions=settings.repetitions(3),
        cpu=True,
    )
    return row.model_copy(update={"figures": row.figures | _agreement(results["ours"], results["theirs"])})


def _made_activations(layers: int, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Random activations, float32 ``[rows, layers, heads, head_dim]``, and labels; some heads are telling.

    Args:
        layers: Number of layers.
        decay: Along its ``k``-th principal axis a head's spread is proportional to ``k ** -decay``; the root
            of the mean of the squares is one.
    """
    rng = np.random.default_rng(0)
    rows = TRAIN_ROWS + VALIDATION_ROWS
    labels = np.arange(rows) % 2
    values = rng.standard_normal((rows, layers, HEADS_OF_LAYER, HEAD_DIM), dtype=np.float32)
    spread = np.arange(1.0, HEAD_DIM + 1.0) ** -decay
    spread /= np.sqrt(np.square(spread).mean())
    for layer in range(layers):
        for head in range(HEADS_OF_LAYER):
            axes, _ = np.linalg.qr(rng.standard_normal((HEAD_DIM, HEAD_DIM)))
            values[:, layer, head] = values[:, layer, head] @ (spread[:, None] * axes).astype(np.float32)
    chosen = rng.choice(layers * HEADS_OF_LAYER, size=TELLING_HEADS, replace=False)
    for number, head in enumerate(chosen):
        direction = rng.standard_normal(HEAD_DIM)
        direction *= (2.0 + 0.05 * number) / np.linalg.norm(direction)
        values[:, head // HEADS_OF_LAYER, head % HEADS_OF_LAYER] += labels[:, None] * direction
    return torch.from_numpy(values), torch.from_numpy(labels)


def _split() -> RowSplit:
    rows = np.random.default_rng(1).permutation(TRAIN_ROWS + VALIDATION_ROWS)
    return given_split(rows[:TRAIN_ROWS], rows[TRAIN_ROWS:], len(rows))


def _score_one_by_one(
    activations: torch.Tensor, labels: torch.Tensor, split: RowSplit, threads: int | None
) -> ProbeScores:
    """The same counts, with one scikit-learn fit for each head."""
    is_safe = labels.numpy()
    _, layers, heads, _ = activations.shape
    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("error", ConvergenceWarning)
        places = ((layer, head) for layer in range(layers) for head in range(heads))
        values = ((activations[:, layer, head].double().numpy(), is_safe, split) for layer, head in places)
        correct = np.array(list(starmap(_correct_of_one, values)), dtype=np.int64)
    train, validation = correct.T.reshape(2, layers, heads)
    return ProbeScores(train, validation, len(split.train), len(split.validation))


def _correct_of_one(
    rows: npt.NDArray[np.float64], is_safe: npt.NDArray[np.int64], split: RowSplit
) -> tuple[int, int]:
    probe = LogisticRegression(C=1.0, max_iter=1000).fit(rows[split.train], is_safe[split.train])
    right = probe.predict(rows) == is_safe
    return int(right[split.train].sum()), int(right[split.validation].sum())


def _one_hessian_each(heads: int) -> None:
    """The matrix product that any Newton step takes, at the size that suits the caches, over and over."""
    piece = min(heads, 8)
    rows = torch.ones(piece, TRAIN_ROWS, HEAD_DIM)
    out = torch.empty(piece, HEAD_DIM, HEAD_DIM)
    for _ in range(heads // piece):
        torch.bmm(rows.transpose(1, 2), rows, out=out)


def _agreement(ours: ProbeScores, theirs: ProbeScores) -> dict[str, float]:
    """How far both ways agree; they must choose the same heads."""
    if set(ours.best_heads(TELLING_HEADS)) != set(theirs.best_heads(TELLING_HEADS)):
        raise AssertionError("The two ways to probe choose different heads, so their times say nothing.")
    differences = np.abs(
        np.stack(
            [ours.train_correct - theirs.train_correct, ours.validation_correct - theirs.validation_correct]
        )
    )
    return {
        "heads chosen by both": float(TELLING_HEADS),
        "heads with other counts": float(differences.any(axis=0).sum()),
        "largest difference in rows": float(differences.max()),
    }
