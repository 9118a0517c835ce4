"""What a lock is: attention heads, a direction and a scale for each, and how they were found.

A ``SafetyLock`` is plain, frozen data. It is checked once, when it is made, so that no invalid lock exists
anywhere in the program; reading and writing files is the business of ``mlflow_safelock.formats``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import rfc8785
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator

from mlflow_safelock.errors import LockValidationError
from mlflow_safelock.kinship import KinshipSketch
from mlflow_safelock.vocabulary import VocabularyDigest

FORMAT_VERSION = 2
"""Newest version of the lock format; older ones stay readable, newer ones are refused. A lock is written in
the oldest version that can hold it, so that one without a tokenizer is what it always was."""

UNIT_NORM_TOLERANCE = 1e-5
"""Largest accepted distance of a direction's Euclidean norm from one (float32 rounding stays far below)."""

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]  # indices are stored as int32
Count = Annotated[int, Field(ge=0, le=2**53 - 1)]  # the whole numbers of canonical JSON (RFC 8785)
Natural = Annotated[int, Field(gt=0, le=2**53 - 1)]
NonEmpty = Annotated[str, Field(min_length=1)]


class AttentionGeometry(BaseModel):
    """The shape of a model's attention.

    Attributes:
        layers: Number of decoder layers.
        heads: Number of query heads in a layer.
        head_dim: Width of one head; its own value in many models, not ``hidden / heads``.
        hidden: Width of the residual stream, which is what the output projection writes to.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    layers: PositiveInt
    heads: PositiveInt
    head_dim: PositiveInt
    hidden: PositiveInt

    def __str__(self) -> str:
        return f"{self.layers} layers x {self.heads} heads (head_dim {self.head_dim}, hidden {self.hidden})"


class FrozenMapping(Mapping[str, str]):
    """A mapping that cannot be changed, so that nothing a lock's digest covers can be."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, str]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> str:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


class LockMetadata(BaseModel):
    """How a lock was made. Every field but ``tokenizer`` is always stored; ``None``: it is not known.

    Attributes:
        base_model: Identity of the base model, usually its hub id.
        base_revision: Revision of the base model (a commit, say).
        architecture: The base's ``model_type`` in its configuration, such as ``llama``.
        geometry: The base's attention shape.
        origin: ``forged`` by this package, or ``published`` by the method's authors and imported.
        last_tokens: How many of each answer's last tokens gave activations (``r`` in the paper).
        pairs: Number of preference pairs.
        split: How probe rows were split: by ``pair`` (no leak), by ``row`` (as the authors do), or ``given``.
        train_fraction: Share of pairs or rows that the probes were fitted on.
        seed: Seed of the split.
        system_prompt: System prompt that the pairs were rendered with.
        dataset_digest: Digest of the preference pairs.
        default_alpha: Strength that the lock's maker recommends.
        created: When it was forged, ISO 8601 in UTC.
        tools: Versions of the software that forged it.
        tokenizer: What is known of the base's tokenizer.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    base_model: NonEmpty
    base_revision: NonEmpty | None
    architecture: NonEmpty | None
    geometry: AttentionGeometry
    origin: Literal["forged", "published"]
    last_tokens: PositiveInt | None
    pairs: PositiveInt | None
    split: Literal["pair", "row", "given"] | None
    train_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None
    system_prompt: str | None
    dataset_digest: Digest | None
    default_alpha: Annotated[float, Field(gt=0.0)]
    created: str | None
    tools: Mapping[str, str] | None
    tokenizer: VocabularyDigest | None = None

    @field_validator("created")
    @classmethod
    def _created_is_a_time_in_utc(cls, value: str | None) -> str | None:
        if value is not None:
            offset = datetime.fromisoformat(value).utcoffset()
            if offset is None or offset.total_seconds() != 0:
                raise ValueError("must be an ISO 8601 time in UTC, such as 2026-01-31T12:00:00+00:00")
        return value

    @field_validator("tools")
    @classmethod
    def _tools_cannot_be_changed(cls, value: Mapping[str, str] | None) -> Mapping[str, str] | None:
        return None if value is None else FrozenMapping(value)

    @field_serializer("tools")
    def _tools_as_plain_values(self, value: Mapping[str, str] | None) -> dict[str, str] | None:
        return None if value is None else dict(value)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> LockMetadata:
        """Check plain values and return the metadata they describe.

        Raises:
            LockValidationError: A field is missing, unknown, or not of its type.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(str(part) for part in fault['loc']) or 'metadata'}: {fault['msg']}"
                for fault in error.errors()
            )
            raise LockValidationError(f"The lock's metadata is not valid: {faults}.") from error


@dataclass(frozen=True, eq=False)
class LockedHead:
    """One attention head of a lock.

    Attributes:
        layer: Index of the decoder layer, from 0.
        head: Index of the query head, from 0.
        direction: Unit vector, float32 of shape ``[head_dim]``, read-only. Points from unsafe to safe.
        std: Population standard deviation of the head's activations along ``direction``, above zero.

    Raises:
        LockValidationError: A value that no head can have.
    """

    layer: int
    head: int
    direction: npt.NDArray[np.float32]
    std: float

    def __post_init__(self) -> None:
        where = f"Head {self.head} of layer {self.layer}"
        for name in ("layer", "head"):
            index = getattr(self, name)
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                raise LockValidationError(f"{where}: {name} must be a whole number from 0, not {index!r}.")
        direction = self.direction
        if not isinstance(direction, np.ndarray) or direction.dtype != np.float32 or direction.ndim != 1:
            raise LockValidationError(f"{where}: the direction must be a float32 vector.")
        if not np.isfinite(direction).all():
            raise LockValidationError(f"{where}: the direction holds NaN or infinity.")
        norm = float(np.linalg.norm(direction.astype(np.float64)))
        if abs(norm - 1.0) > UNIT_NORM_TOLERANCE:
            raise LockValidationError(f"{where}: the direction's norm is {norm:.6g}, and it must be 1.")
        if isinstance(self.std, bool) or not isinstance(self.std, float) or not np.isfinite(self.std):
            raise LockValidationError(f"{where}: std must be a finite float, not {self.std!r}.")
        if self.std <= 0.0:
            raise LockValidationError(f"{where}: std must be above zero, not {self.std!r}.")
        object.__setattr__(self, "direction", _unchangeable(direction))
        object.__setattr__(self, "std", float(self.std))

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and unpickled heads go through the checks, and are as frozen as the original.
        return type(self), (self.layer, self.head, self.direction, self.std)

    def __repr__(self) -> str:
        return f"LockedHead(layer={self.layer}, head={self.head}, std={self.std:.4g})"


@dataclass(frozen=True, eq=False, repr=False)
class SafetyLock:
    """A Meta-SafetyLock (arXiv 2410.10343): head directions found once in a base model.

    Attributes:
        heads: The locked heads, sorted by layer, then head (given in any order).
        metadata: What the lock is for and how it was made.
        scores: Probe score of every head, float32 of shape ``[layers, heads]`` in 0-1, read-only; ``None``
            where it is not known. A score is the mean of train and validation accuracy (METHOD step 4).
        unit_biases: ``W_o d`` of every locked head in the base, float32 of shape ``[K, hidden]``, in the
            order of ``heads``, read-only: where a fine-tune has left its output projections alone, its
            biases follow without its weights. ``None`` where they are not known.
        sketch: Some of the base's weights, by which its descendants are known; ``None`` where there is none.

    Two locks are equal when their digests are.

    Raises:
        LockValidationError: No heads, a head twice, a head outside the geometry, a direction of another
            length than ``head_dim``, scores or unit biases of another shape, or a sketch of layers that the
            geometry has not.
    """

    heads: tuple[LockedHead, ...]
    metadata: LockMetadata
    scores: npt.NDArray[np.float32] | None = field(default=None)
    unit_biases: npt.NDArray[np.float32] | None = field(default=None)
    sketch: KinshipSketch | None = field(default=None)

    def __post_init__(self) -> None:
        geometry = self.metadata.geometry
        heads = tuple(sorted(self.heads, key=lambda locked: (locked.layer, locked.head)))
        if not heads:
            raise LockValidationError("A lock needs at least one head.")
        seen: set[tuple[int, int]] = set()
        for locked in heads:
            where = (locked.layer, locked.head)
            if where in seen:
                raise LockValidationError(f"Head {locked.head} of layer {locked.layer} is in the lock twice.")
            seen.add(where)
            if locked.layer >= geometry.layers or locked.head >= geometry.heads:
                raise LockValidationError(
                    f"Head {locked.head} of layer {locked.layer} lies outside the declared {geometry}."
                )
            if locked.direction.shape != (geometry.head_dim,):
                raise LockValidationError(
                    f"Head {locked.head} of layer {locked.layer}: the direction has {locked.direction.size} "
                    f"numbers, and head_dim is {geometry.head_dim}."
                )
        order = sorted(range(len(heads)), key=lambda index: (self.heads[index].layer, self.heads[index].head))
        object.__setattr__(self, "heads", heads)
        if self.scores is not None:
            object.__setattr__(self, "scores", _checked_scores(self.scores, geometry))
        if self.unit_biases is not None:
            biases = _checked_unit_biases(self.unit_biases, len(heads), geometry)
            object.__setattr__(self, "unit_biases", _unchangeable(biases[order]))
        if self.sketch is not None:
            _check_sketch(self.sketch, geometry)

    @property
    def geometry(self) -> AttentionGeometry:
        """The attention shape of the base model."""
        return self.metadata.geometry

    @property
    def base_model(self) -> str:
        """Identity of the base model."""
        return self.metadata.base_model

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that hold a locked head, ascending."""
        return tuple(sorted({locked.layer for locked in self.heads}))

    def heads_of_layer(self, layer: int) -> tuple[LockedHead, ...]:
        """The locked heads of one layer, by head index; empty where it has none."""
        return tuple(locked for locked in self.heads if locked.layer == layer)

    def ranked_heads(self) -> tuple[LockedHead, ...]:
        """The locked heads, best probe score first, ties to the lower layer, then the lower head.

        Raises:
            LockValidationError: The lock holds no scores (published locks do not).
        """
        scores = self.scores
        if scores is None:
            raise LockValidationError("This lock holds no probe scores, so its heads have no ranking.")
        return tuple(
            sorted(self.heads, key=lambda h: (-float(scores[h.layer, h.head]), h.layer, h.head)),
        )

    @cached_property
    def digest(self) -> str:
        """``sha256:…`` over the canonical form of everything the lock says (docs/lock-format.md)."""
        tensors = {
            name: {
                "dtype": values.dtype.name,
                "shape": list(values.shape),
                "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
            }
            for name, values in self.tensors().items()
        }
        metadata = canonical_metadata(self.metadata).decode()
        return f"sha256:{hashlib.sha256(rfc8785.dumps([metadata, tensors])).hexdigest()}"

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """The lock's numbers as they are stored, little-endian and contiguous, ``K`` being ``len(heads)``.

        ``layers`` int32 ``[K]``, ``heads`` int32 ``[K]``, ``directions`` float32 ``[K, head_dim]``, ``stds``
        float64 ``[K]`` and, where they are known, ``scores`` float32 ``[layers, heads]``, ``unit_biases``
        float32 ``[K, hidden]``, and the sketch: ``sketch_layers`` int32, ``sketch_offsets`` int64 and
        ``sketch_values`` float16.
        """
        tensors: dict[str, npt.NDArray[Any]] = {
            "layers": np.array([locked.layer for locked in self.heads], dtype="<i4"),
            "heads": np.array([locked.head for locked in self.heads], dtype="<i4"),
            "directions": np.ascontiguousarray([locked.direction for locked in self.heads], dtype="<f4"),
            "stds": np.array([locked.std for locked in self.heads], dtype="<f8"),
        }
        if self.scores is not None:
            tensors["scores"] = np.ascontiguousarray(self.scores, dtype="<f4")
        if self.unit_biases is not None:
            tensors["unit_biases"] = np.ascontiguousarray(self.unit_biases, dtype="<f4")
        if self.sketch is not None:
            tensors["sketch_layers"] = self.sketch.layers
            tensors["sketch_offsets"] = self.sketch.offsets
            tensors["sketch_values"] = self.sketch.values
        return tensors

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, SafetyLock) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.heads, self.metadata, self.scores, self.unit_biases, self.sketch)

    def __repr__(self) -> str:
        geometry = self.geometry
        return (
            f"SafetyLock({self.base_model!r}, {len(self.heads)} of {geometry.layers * geometry.heads} heads, "
            f"layers {self.layers[0]}-{self.layers[-1]}, {self.metadata.origin}, {self.digest[:19]})"
        )


def canonical_metadata(metadata: LockMetadata) -> bytes:
    """The metadata, with the format version, as canonical JSON (RFC 8785): what is stored and digested."""
    values = metadata.model_dump(mode="json")
    if metadata.tokenizer is None:
        del values["tokenizer"]
    return rfc8785.dumps({"format_version": 1 if metadata.tokenizer is None else 2, **values})


def _checked_scores(scores: npt.NDArray[np.float32], geometry: AttentionGeometry) -> npt.NDArray[np.float32]:
    shape = (geometry.layers, geometry.heads)
    if not isinstance(scores, np.ndarray) or scores.dtype != np.float32 or scores.shape != shape:
        raise LockValidationError(f"Probe scores must be float32 of shape {list(shape)}.")
    if not np.isfinite(scores).all() or scores.min() < 0.0 or scores.max() > 1.0:
        raise LockValidationError("Probe scores must lie between 0 and 1.")
    return _unchangeable(scores)


def _checked_unit_biases(
    biases: npt.NDArray[np.float32], heads: int, geometry: AttentionGeometry
) -> npt.NDArray[np.float32]:
    shape = (heads, geometry.hidden)
    if not isinstance(biases, np.ndarray) or biases.dtype != np.float32 or biases.shape != shape:
        raise LockValidationError(f"Unit biases must be float32 of shape {list(shape)}.")
    if not np.isfinite(biases).all():
        raise LockValidationError("Unit biases must be finite.")
    return biases


def _check_sketch(sketch: KinshipSketch, geometry: AttentionGeometry) -> None:
    numbers = geometry.heads * geometry.head_dim * geometry.hidden
    if sketch.layers[-1] >= geometry.layers or (sketch.offsets + sketch.values.shape[2] > numbers).any():
        raise LockValidationError(f"The kinship sketch lies outside the declared {geometry}.")


def _unchangeable(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A copy over immutable bytes: unlike a read-only flag, that cannot be switched back."""
    return np.frombuffer(values.tobytes(), dtype=np.float32).reshape(values.shape)
