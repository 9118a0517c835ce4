"""A probe for every head: how well it tells safe answers from unsafe ones (METHOD, forge steps 4 and 5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mlflow_safelock.errors import ForgeError
from mlflow_safelock.forging.logistic import fit_logistic
from mlflow_safelock.forging.progress import tracked
from mlflow_safelock.forging.splits import RowSplit
from mlflow_safelock.forging.workers import started_on_all_cores

CHUNK_VALUES = {"cpu": 2**20, "cuda": 2**26}
"""How many activations are worked on at once, by kind of device: about what a CPU's caches hold, and what
gives a GPU enough to do. In all, probing takes about 40 bytes for each of them: 40 MB, or 2.7 GB."""


@dataclass(frozen=True, eq=False)
class ProbeScores:
    """How many rows each head's probe gets right. Counts, so that ties are ties.

    Attributes:
        train_correct: int64 ``[layers, heads]``.
        validation_correct: int64 ``[layers, heads]``.
        train_rows: Number of rows that the probes were fitted on.
        validation_rows: Number of rows that they were validated on.
    """

    train_correct: npt.NDArray[np.int64]
    validation_correct: npt.NDArray[np.int64]
    train_rows: int
    validation_rows: int

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """The mean of train and validation accuracy, float64 ``[layers, heads]`` in 0-1."""
        return self._weighted_counts / (2.0 * self.train_rows * self.validation_rows)

    def best_heads(self, heads: int) -> tuple[tuple[int, int], ...]:
        """The best ``(layer, head)``, best first; ties go to the lower layer, then the lower head."""
        ranking = np.argsort(-self._weighted_counts, axis=None, kind="stable")[:heads]
        layers, columns = np.unravel_index(ranking, self.train_correct.shape)
        return tuple(zip(layers.tolist(), columns.tolist(), strict=True))

    @property
    def _weighted_counts(self) -> npt.NDArray[np.int64]:
        return self.train_correct * self.validation_rows + self.validation_correct * self.train_rows


def score_heads(
    activations: torch.Tensor,
    labels: torch.Tensor,
    split: RowSplit,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> ProbeScores:
    """Fit a logistic regression (L2, C = 1, with intercept) on every head and count what it gets right.

    Heads are worked on in chunks, so the memory needed beside the activations is bounded (``CHUNK_VALUES``),
    by the chunk or by what one head takes.

    Args:
        activations: Finite, of any floating dtype, ``[rows, layers, heads, head_dim]``.
        labels: ``[rows]``; 1 safe, 0 unsafe.
        split: The rows to fit on and to validate on.
        device: Where to compute.
        progress: Whether to show a progress bar.

    Returns:
        The counts; the same input gives the same counts.

    Raises:
        ForgeError: A side of the split holds only safe or only unsafe rows, or a probe could not be fitted.
    """
    rows, layers, heads, head_dim = activations.shape
    train, validation = torch.from_numpy(split.train), torch.from_numpy(split.validation)
    for name, side in (("train", train), ("validation", validation)):
        if labels[side].min() == labels[side].max():
            raise ForgeError(
                f"The {name} rows hold answers of one kind only, and a probe needs safe and unsafe ones.",
                next_step="Use more preference pairs, or another seed.",
            )
    device = torch.device(device)
    all_heads = activations.reshape(rows, layers * heads, head_dim)
    chunk = max(1, CHUNK_VALUES.get(device.type, CHUNK_VALUES["cuda"]) // (rows * head_dim))
    train, validation, labels = train.to(device), validation.to(device), labels.to(device).bool()

    def correct_of(piece: torch.Tensor) -> torch.Tensor:
        return _correct(piece.to(device).transpose(0, 1), labels, train, validation).cpu()

    with started_on_all_cores(correct_of, torch.split(all_heads, chunk, dim=1), device) as started:
        found = [piece.result() for piece in tracked(started, "Probing heads", progress=progress)]
    train_correct, validation_correct = torch.cat(found, dim=1).reshape(2, layers, heads).numpy()
    return ProbeScores(train_correct, validation_correct, len(train), len(validation))


def _correct(
    rows: torch.Tensor, labels: torch.Tensor, train: torch.Tensor, validation: torch.Tensor
) -> torch.Tensor:
    """What the probes get right, int64 ``[2, heads]``: of the train rows, and of the validation rows."""
    heads, _, dim = rows.shape
    train_rows = torch.empty(heads, len(train), dim, dtype=torch.float64, device=rows.device)
    probes = fit_logistic(train_rows.copy_(rows[:, train]), labels[train])
    right = probes.predict(rows) == labels
    return torch.stack([right[:, side].sum(dim=1) for side in (train, validation)])
