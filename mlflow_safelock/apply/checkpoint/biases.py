"""The biases that a locked checkpoint holds: those of the lock, and zeros that the architecture asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from mlflow_safelock.apply.architectures import ARCHITECTURES, Architecture
from mlflow_safelock.apply.checkpoint.columns import bias_dtype, columns_of
from mlflow_safelock.apply.checkpoint.fp8 import CODE, unknown_scheme
from mlflow_safelock.apply.checkpoint.source import CheckpointSource
from mlflow_safelock.apply.displacement import (
    Displacement,
    Workspace,
    displacements,
    output_bias,
    stored_bias,
)
from mlflow_safelock.errors import CheckpointError, UnsupportedArchitectureError
from mlflow_safelock.lock import SafetyLock


@dataclass(frozen=True, eq=False)
class Biases:
    """What is done to the weights of a checkpoint.

    Attributes:
        added: New tensors, by name.
        replaced: New values of tensors that are there, by name, of the same shape and dtype.
        layers: The layers with a bias from the lock.
        error: Largest distance of a stored bias from the one in float64, relative to the length of that.
        pushes: What the lock adds to each of these layers' outputs, float64 ``[hidden]``, by layer.
    """

    added: Mapping[str, torch.Tensor]
    replaced: Mapping[str, torch.Tensor]
    layers: tuple[int, ...]
    error: float
    pushes: Mapping[int, torch.Tensor]


def biases_of(source: CheckpointSource, lock: SafetyLock, alpha: float) -> Biases:
    """Compute a lock's biases from the checkpoint's own weights, of which only the locked columns are read.

    Args:
        source: The unlocked checkpoint.
        lock: A lock of its attention shape.
        alpha: Strength.

    Returns:
        The biases in the dtype of the weights they come from, or of the biases they replace.

    Raises:
        AlphaError: A bias would be infinite in that dtype.
        CheckpointError: The weights are not as the configuration says.
        UnsupportedArchitectureError: The architecture has no place for the biases.
    """
    paths = [projection_path(source, layer) for layer in range(source.geometry.layers)]
    workspace = Workspace()
    found = {
        f"{paths[displacement.layer]}.bias": _layer_bias(
            source, paths[displacement.layer], displacement, alpha, workspace
        )
        for displacement in displacements(lock, alpha)
    }
    pushed = {name: bias.stored for name, bias in found.items()}
    error = max(bias.error for bias in found.values())
    pushes = dict(zip(lock.layers, (bias.push for bias in found.values()), strict=True))
    if has_output_bias(source):
        return Biases({}, pushed, lock.layers, error, pushes)
    _refuse_without_place(source)
    zeros = {name: bias for path in paths for name, bias in _zero_biases(source, path)}
    _refuse_unused_biases(source, zeros)
    return Biases({**zeros, **pushed}, {}, lock.layers, error, pushes)


def has_output_bias(source: CheckpointSource) -> bool:
    """Whether stock ``transformers`` gives the output projections of this checkpoint a bias."""
    decided_by = source.architecture.output_bias
    return decided_by == "always" or bool(getattr(source.config, decided_by, False))


def projection_path(source: CheckpointSource, layer: int) -> str:
    """Name of a layer's output projection in the weights, once its weight is known to be there and sound."""
    architecture, geometry, tensors = source.architecture, source.geometry, source.weights.tensors
    path = f"{architecture.layers}.{layer}.{architecture.output_projection}"
    # Some checkpoints, such as GPT-2's own, name their tensors from the bare model on.
    candidates = (path, path.split(".", 1)[1])
    found = next((name for name in candidates if f"{name}.weight" in tensors), None)
    if found is None:
        raise CheckpointError(
            f"{source.layout.model} has no tensor {path}.weight.", next_step="Copy the fine-tune again."
        )
    weight = tensors[f"{found}.weight"]
    if weight.dtype is None and (weight.code != CODE or source.fp8 is None):
        raise unknown_scheme(f"{found}.weight in {source.layout.model} is stored as {weight.code}")
    expected = (geometry.hidden, geometry.heads * geometry.head_dim)
    expected = expected if architecture.layout == "linear" else expected[::-1]
    if weight.shape != expected:
        raise CheckpointError(
            f"{found}.weight in {source.layout.model} is of shape {weight.shape}, and the configuration says "
            f"{expected}."
        )
    return found


@dataclass(frozen=True, eq=False)
class _LayerBias:
    """A layer's bias.

    Attributes:
        stored: As the checkpoint holds it.
        error: Distance from the one in float64, relative to its length.
        push: What the lock has in it, float64.
    """

    stored: torch.Tensor
    error: float
    push: torch.Tensor


def _layer_bias(
    source: CheckpointSource, path: str, displacement: Displacement, alpha: float, workspace: Workspace
) -> _LayerBias:
    push = output_bias(columns_of(source, path), displacement, workspace)
    own = _own_bias(source, f"{path}.bias") if has_output_bias(source) else None
    exact = push if own is None else push + own.to(push)
    dtype = bias_dtype(source, path) if own is None else own.dtype
    stored = stored_bias(push, own, dtype, displacement.layer, alpha)
    length = float(exact.norm())
    error = float((stored.double() - exact).norm()) / length if length else 0.0
    return _LayerBias(stored, error, push)


def _own_bias(source: CheckpointSource, name: str) -> torch.Tensor:
    weights, expected = source.weights, (source.geometry.hidden,)
    if name not in weights.tensors:
        raise CheckpointError(f"{weights.folder} has no tensor {name}, and its architecture has that bias.")
    stored = weights.tensors[name]
    if stored.shape != expected or stored.dtype is None:
        raise CheckpointError(
            f"{name} in {weights.folder} is {stored.code} of shape {stored.shape}, and should be numbers of "
            f"floating point, of shape {expected}.",
            next_step="Copy the fine-tune again, or save it again with save_pretrained.",
        )
    return weights.read(name)


def _refuse_without_place(source: CheckpointSource) -> None:
    if source.architecture.standalone in ("flag", "rewritten"):
        return
    can = ", ".join(sorted(row.model_type for row in ARCHITECTURES.values() if row.standalone))
    raise UnsupportedArchitectureError(
        f"A checkpoint of type {source.architecture.model_type!r} has no place for the biases of a lock"
        f"{_without_flag(source.architecture)}. Types that have one: {can}.",
        next_step="Lock it in memory (apply_lock), or promote it with the overlay carrier.",
    )


def _without_flag(architecture: Architecture) -> str:
    if architecture.output_bias in ("always", "never"):
        return ""
    return f" when {architecture.output_bias} is off"


def _refuse_unused_biases(source: CheckpointSource, added: Mapping[str, torch.Tensor]) -> None:
    """Refuse biases that transformers drops on loading now, and would not once the flag is set."""
    unused = sorted(set(added) & set(source.weights.tensors))
    if unused:
        raise CheckpointError(
            f"{source.layout.model} holds {unused[0]}, which its configuration does not ask for: "
            "transformers drops it on loading. It may have been saved from a locked model.",
            next_step="Save the unlocked fine-tune again with save_pretrained.",
        )


def _zero_biases(source: CheckpointSource, output_path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Zeros for the biases that a layer is given: of its output projection, and of those that go with it."""
    tensors, architecture = source.weights.tensors, source.architecture
    layer_path = output_path.removesuffix(architecture.output_projection)
    present = [
        projection
        for projection in architecture.biased_where_present
        if f"{layer_path}{projection}.weight" in tensors
    ]
    beside = (layer_path + projection for projection in (*architecture.biased_with_output, *present))
    for path in (output_path, *beside):
        if f"{path}.weight" not in tensors:
            raise CheckpointError(f"{source.layout.model} has no tensor {path}.weight.")
        yield f"{path}.bias", torch.zeros(tensors[f"{path}.weight"].shape[0], dtype=bias_dtype(source, path))
