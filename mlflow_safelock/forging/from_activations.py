"""Activations and labels -> lock: the last half of forging, for activations from anywhere."""

from __future__ import annotations

import warnings
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch

from mlflow_safelock.errors import ForgeError
from mlflow_safelock.forging.making import forged_metadata
from mlflow_safelock.forging.probed_heads import ProbedHeads, check_heads
from mlflow_safelock.forging.probes import score_heads
from mlflow_safelock.forging.splits import Indices, RowSplit, drawn_split, given_split
from mlflow_safelock.lock import AttentionGeometry, LockMetadata, SafetyLock


@overload
def forge_from_activations(
    activations: torch.Tensor | npt.NDArray[np.floating[Any]],
    labels: Any,
    *,
    heads: int = 24,
    train_rows: Any = None,
    val_rows: Any = None,
    base_model: str | None = None,
    hidden: int | None = None,
    split: Literal["pair", "row"] = "pair",
    seed: int = 0,
    train_fraction: float = 0.6,
    pairs: Any = None,
    last_tokens: int | None = None,
    base_revision: str | None = None,
    architecture: str | None = None,
    system_prompt: str | None = None,
    dataset_digest: str | None = None,
    default_alpha: float = 6.0,
    created: str | None = None,
    device: torch.device | str = "cpu",
) -> SafetyLock: ...


@overload
def forge_from_activations(
    activations: torch.Tensor | npt.NDArray[np.floating[Any]],
    labels: Any,
    *,
    heads: tuple[int, ...],
    train_rows: Any = None,
    val_rows: Any = None,
    base_model: str | None = None,
    hidden: int | None = None,
    split: Literal["pair", "row"] = "pair",
    seed: int = 0,
    train_fraction: float = 0.6,
    pairs: Any = None,
    last_tokens: int | None = None,
    base_revision: str | None = None,
    architecture: str | None = None,
    system_prompt: str | None = None,
    dataset_digest: str | None = None,
    default_alpha: float = 6.0,
    created: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[SafetyLock, ...]: ...


def forge_from_activations(
    activations: torch.Tensor | npt.NDArray[np.floating[Any]],
    labels: Any,
    *,
    heads: int | tuple[int, ...] = 24,
    train_rows: Any = None,
    val_rows: Any = None,
    base_model: str | None = None,
    hidden: int | None = None,
    split: Literal["pair", "row"] = "pair",
    seed: int = 0,
    train_fraction: float = 0.6,
    pairs: Any = None,
    last_tokens: int | None = None,
    base_revision: str | None = None,
    architecture: str | None = None,
    system_prompt: str | None = None,
    dataset_digest: str | None = None,
    default_alpha: float = 6.0,
    created: str | None = None,
    device: torch.device | str = "cpu",
) -> SafetyLock | tuple[SafetyLock, ...]:
    """Forge a lock from head activations (METHOD, forge steps 4 to 6).

    Args:
        activations: Head outputs, floating, ``[rows, layers, heads, head_dim]``.
        labels: ``[rows]``; 1 (or ``True``) for a safe answer's token, 0 for an unsafe one's.
        heads: How many heads to lock (``K`` in the paper); several numbers give as many locks.
        train_rows: Row numbers to fit the probes on; with ``val_rows`` they are the split (recorded as
            ``given``), and ``split``, ``seed`` and ``train_fraction`` do not count.
        val_rows: Row numbers to validate the probes on.
        base_model: Identity of the base model; recorded as ``unknown`` where it is not given.
        hidden: Width of the model's residual stream; ``heads * head_dim`` where it is not given.
        split: ``pair`` keeps the rows of a pair together, which does not leak; ``row`` draws single rows, as
            the method's authors do.
        seed: Seed of the split.
        train_fraction: Share of pairs or rows that the probes are fitted on.
        pairs: ``[rows]`` of integers; rows with the same number belong to one pair. Not needed where the rows
            are laid out pair by pair, ``r`` safe rows and then ``r`` unsafe rows.
        last_tokens: Recorded: tokens of each answer. Taken from the layout where the split relies on it.
        base_revision: Recorded: revision of the base model.
        architecture: Recorded: ``model_type`` of the base model.
        system_prompt: Recorded: system prompt that the pairs were rendered with.
        dataset_digest: Recorded: digest of the pairs (``dataset_digest``).
        default_alpha: Recorded: strength to recommend.
        created: Recorded: time in UTC, ISO 8601; now where it is not given.
        device: Where to compute.

    Returns:
        The lock, or one for each number of heads. The same arguments, ``created`` among them, give the same
        digest.

    Raises:
        ForgeError: Arguments that contradict each other or the data, too few pairs, activations that are not
            finite, or a head without a direction.
        LockValidationError: A recorded value that a lock cannot hold.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = np.tile([1, 1, 0, 0], 20)                      # 20 pairs, 2 tokens of each answer
        >>> activations = rng.normal(size=(80, 3, 4, 8))            # 3 layers x 4 heads, head_dim 8
        >>> activations[labels == 1, 2, 1] += 1.0                   # one head knows the difference
        >>> lock = forge_from_activations(activations, labels, heads=1, base_model="example/base")
        >>> lock.heads[0].layer, lock.heads[0].head
        (2, 1)
    """
    values, is_safe = _checked_activations(activations), _checked_labels(labels, len(activations))
    geometry = AttentionGeometry(
        layers=values.shape[1],
        heads=values.shape[2],
        head_dim=values.shape[3],
        hidden=hidden or values.shape[2] * values.shape[3],
    )
    check_heads(heads, geometry)
    is_given = train_rows is not None or val_rows is not None
    numbers = None if pairs is None else _checked_pairs(pairs, len(is_safe))
    if numbers is None and split == "pair" and not is_given:
        numbers, last_tokens = _pair_by_pair(is_safe.numpy())
    rows = (
        given_split(train_rows, val_rows, len(is_safe))
        if is_given
        else drawn_split(split, numbers, len(is_safe), train_fraction, seed)
    )
    metadata = forged_metadata(
        rows,
        base_model=base_model,
        base_revision=base_revision,
        architecture=architecture,
        geometry=geometry,
        last_tokens=last_tokens,
        pairs=None if numbers is None else len(np.unique(numbers)),
        system_prompt=system_prompt,
        dataset_digest=dataset_digest,
        default_alpha=default_alpha,
        created=created,
    )
    return probe_activations(values, is_safe, rows, metadata, device=device).locks(heads)


def probe_activations(
    activations: torch.Tensor,
    labels: torch.Tensor,
    split: RowSplit,
    metadata: LockMetadata,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> ProbedHeads:
    """Probe every head (METHOD, forge step 4); locks of any size come out of the result.

    Args:
        activations: Head outputs, floating, ``[rows, layers, heads, head_dim]``.
        labels: ``[rows]``; 1 safe, 0 unsafe.
        split: The rows to fit on and to validate on.
        metadata: How the activations came about.
        device: Where to compute.
        progress: Whether to show a progress bar.

    Raises:
        ForgeError: Activations that are not finite, a side of the split without safe or unsafe rows, or a
            probe that cannot be fitted.
    """
    _check_finite(activations)
    scores = score_heads(activations, labels, split, device=device, progress=progress)
    return ProbedHeads(activations, labels, scores, metadata)


def _checked_activations(activations: Any) -> torch.Tensor:
    tensor = _as_tensor(activations)
    if tensor is None or not tensor.is_floating_point():
        raise ForgeError("Activations must be a tensor or array of floating numbers.")
    if tensor.ndim != 4 or 0 in tensor.shape:
        raise ForgeError(
            f"Activations must be of shape [rows, layers, heads, head_dim], not {list(tensor.shape)}."
        )
    return tensor.cpu()


def _checked_labels(labels: Any, rows: int) -> torch.Tensor:
    tensor = _as_tensor(np.asarray(labels) if isinstance(labels, list | tuple) else labels)
    if tensor is None or tensor.shape != (rows,):
        raise ForgeError(f"Labels must be one number for each of the {rows} rows.")
    wrong = tensor[(tensor != 0) & (tensor != 1)]
    if len(wrong):
        raise ForgeError(f"Labels must be 1 for safe and 0 for unsafe, and {wrong[0].item()} is among them.")
    return tensor.cpu().long()


def _checked_pairs(pairs: Any, rows: int) -> Indices:
    numbers = np.asarray(pairs)
    if numbers.shape != (rows,) or numbers.dtype.kind not in "iu":
        raise ForgeError(f"pairs must be one whole number for each of the {rows} rows.")
    return numbers.astype(np.int64)


def _as_tensor(values: Any) -> torch.Tensor | None:
    if isinstance(values, torch.Tensor):
        return values.detach()
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub" or values.dtype.itemsize > 8:
        return None
    # A read-only array, such as one mapped from a file, is as good as any: nothing is written to it.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


def _pair_by_pair(labels: npt.NDArray[np.int64]) -> tuple[Indices, int]:
    """Pair numbers and ``r`` for rows laid out pair by pair: ``r`` safe rows, then ``r`` unsafe rows."""
    last_tokens = int(np.argmin(labels))
    pairs = len(labels) // (2 * last_tokens) if last_tokens else 0
    if not np.array_equal(labels, np.tile(np.repeat([1, 0], last_tokens), pairs)):
        raise ForgeError(
            "The labels do not show which rows belong to one pair: they are not laid out pair by pair, some "
            "safe rows and then as many unsafe rows, always the same number.",
            next_step="Give every row's pair as pairs=..., or the split as train_rows=... and val_rows=....",
        )
    return np.repeat(np.arange(pairs), 2 * last_tokens), last_tokens


def _check_finite(activations: torch.Tensor) -> None:
    # Layer by layer, because the answer is as large as what is asked about.
    for layer in range(activations.shape[1]):
        wrong = (~torch.isfinite(activations[:, layer])).nonzero()
        if len(wrong):
            row, head, _ = wrong[0].tolist()
            raise ForgeError(
                f"The activations of layer {layer}, head {head} hold NaN or infinity (row {row} for one).",
                next_step="Run the model in float32 or bfloat16; float16 overflows in some models.",
            )
