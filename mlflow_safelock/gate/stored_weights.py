"""The weights of a fine-tune as they are stored: whether they are whole, and how alike they are to a base.

Only the index and the headers are read, and, for kinship, the few runs of numbers that a lock's sketch names:
what that costs does not grow with the model.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_safelock.apply.architectures import Architecture
from mlflow_safelock.errors import SourceError
from mlflow_safelock.kinship import KinshipSketch, cosine
from mlflow_safelock.lock import AttentionGeometry
from mlflow_safelock.provenance import ArtifactReader, Span, read_header
from mlflow_safelock.provenance.fingerprint import for_each

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20

ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of one number, by what safetensors calls its type."""

COPY_AGAIN = "Log the fine-tune again from a sound copy, and promote the new version."


@dataclass(frozen=True)
class StoredWeight:
    """One tensor.

    Attributes:
        file: Path of its file in the artifacts.
        dtype: Its type as safetensors calls it.
        shape: Its dimensions.
        span: Where its bytes are in the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    span: Span

    @property
    def is_plain(self) -> bool:
        """Whether its numbers are what is stored: floating point, with no scales beside them."""
        return self.dtype in ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredWeights:
    """All tensors that ``transformers`` finds in a folder, by name."""

    reader: ArtifactReader
    tensors: Mapping[str, StoredWeight]

    def output_projection(self, architecture: Architecture, layer: int) -> StoredWeight | None:
        """The weight of a layer's attention output projection; ``None`` where it is stored otherwise.

        Raises:
            SourceError: It is stored under several names, of which ``transformers`` takes any.
        """
        name = self._output_projection_name(architecture, layer)
        return None if name is None else self.tensors[name]

    def _output_projection_name(self, architecture: Architecture, layer: int) -> str | None:
        inside = f"{layer}.{architecture.output_projection}.weight"
        # Some checkpoints name their tensors from the bare model on, and some put more before it.
        names = [f"{path}.{inside}" for path in _suffixes(architecture.layers)]
        found = [name for name in names if name in self.tensors]
        if len(found) > 1:
            raise self._several(f"attention output projection of layer {layer}", found)
        path = f".{architecture.layers.rsplit('.', 1)[-1]}.{inside}"
        found = found or [name for name in self.tensors if name.endswith(path)]
        return found[0] if len(found) == 1 else None

    def biases(
        self, architecture: Architecture, geometry: AttentionGeometry, paths: Collection[str]
    ) -> dict[int, dict[str, npt.NDArray[np.float64]]]:
        """The biases of some modules of each layer; layers without any are left out.

        Args:
            architecture: Where the layers are.
            geometry: The model's attention shape.
            paths: The paths of the modules inside a layer, such as ``self_attn.o_proj``.

        Returns:
            By layer and by path, float64 of shape ``[outputs]``.

        Raises:
            SourceError: They cannot be read, are of a type that is not known here, or are stored under
                several names, of which ``transformers`` takes any.
        """
        places: dict[tuple[int, str], str] = {}
        is_biased = any(name.endswith(".bias") for name in self.tensors)
        for layer in range(geometry.layers if is_biased else 0):
            beginnings = self._beginnings(architecture, layer)
            for path in paths:
                names = [f"{beginning}{path}.bias" for beginning in beginnings]
                found = sorted({name for name in names if name in self.tensors})
                if len(found) > 1:
                    raise self._several(f"bias of {path} in layer {layer}", found)
                if found:
                    places[layer, path] = found[0]
        biases: dict[int, dict[str, npt.NDArray[np.float64]]] = {}
        for (layer, path), values in zip(places, self._vectors(list(places.values())), strict=True):
            biases.setdefault(layer, {})[path] = values
        return biases

    def _vectors(self, names: Sequence[str]) -> list[npt.NDArray[np.float64]]:
        """The numbers of some small tensors, those of one file by one request."""
        spans: dict[str, list[Span]] = defaultdict(list)
        for stored in (self.tensors[name] for name in names):
            if stored.dtype not in _DECODERS:
                raise SourceError(
                    f"The weights at {self.reader.location} have a bias of type {stored.dtype}, of which "
                    "nothing can be told.",
                    next_step="Log the fine-tune with biases in float32, float16 or bfloat16.",
                )
            spans[stored.file].append(stored.span)
        read = {file: iter(self.reader.read_many(file, of_file)) for file, of_file in spans.items()}
        stored_ones = [self.tensors[name] for name in names]
        vectors = [_DECODERS[one.dtype](next(read[one.file])).astype(np.float64) for one in stored_ones]
        for name, values in zip(names, vectors, strict=True):
            if not np.isfinite(values).all():
                raise SourceError(
                    f"The weights at {self.reader.location} have numbers in {name!r} that are not finite.",
                    next_step=COPY_AGAIN,
                )
        return vectors

    def _several(self, what: str, names: Sequence[str]) -> SourceError:
        return SourceError(
            f"The weights at {self.reader.location} have the {what} under several names, "
            f"{' and '.join(map(repr, names))}, and one of them is loaded.",
            next_step=COPY_AGAIN,
        )

    def _beginnings(self, architecture: Architecture, layer: int) -> tuple[str, ...]:
        """What names of a layer's tensors begin with."""
        usual = tuple(f"{path}.{layer}." for path in _suffixes(architecture.layers))
        name = self._output_projection_name(architecture, layer)
        if name is None:
            return usual
        return (*usual, name.removesuffix(f"{architecture.output_projection}.weight"))

    def check_output_projections(self, architecture: Architecture, geometry: AttentionGeometry) -> None:
        """See that every layer has its attention output projection, in a shape that fits.

        A quantised projection is stored in other names and shapes, so of that only the presence is looked at.

        Raises:
            SourceError: One is missing, or of another shape.
        """
        shape = (geometry.hidden, geometry.heads * geometry.head_dim)
        if architecture.layout == "conv1d":
            shape = shape[::-1]
        for layer in range(geometry.layers):
            weight = self.output_projection(architecture, layer)
            if weight is not None and weight.dtype in _DECODERS and weight.shape != shape:
                raise SourceError(
                    f"The weights at {self.reader.location} have an attention output projection of shape "
                    f"{list(weight.shape)} in layer {layer}, and the configuration makes it {list(shape)}.",
                    next_step=COPY_AGAIN,
                )
            if weight is None and not self._has_some(architecture, layer):
                raise SourceError(
                    f"The weights at {self.reader.location} lack the attention output projection of layer "
                    f"{layer} ({architecture.output_projection}): it would be loaded with random numbers.",
                    next_step=COPY_AGAIN,
                )

    def kinship(self, sketch: KinshipSketch, architecture: Architecture) -> float | None:
        """How alike the weights are to those that a sketch was taken of: cosine, -1 to 1.

        Returns:
            ``None`` where they cannot be compared: quantised, or merged into other tensors.

        Raises:
            SourceError: The weights cannot be read.
        """
        length = sketch.values.shape[2]
        parts: list[tuple[StoredWeight, int, int]] = []
        for layer, offsets in zip(sketch.layers.tolist(), sketch.offsets.tolist(), strict=True):
            weight = self.output_projection(architecture, layer)
            if weight is None or weight.dtype not in _DECODERS:
                return None
            if max(offsets) + length > math.prod(weight.shape):
                return 0.0  # a smaller matrix is no descendant's
            parts.extend((weight, offset, length) for offset in offsets)
        return cosine(sketch, np.array(self.numbers(parts)).reshape(sketch.values.shape))

    def numbers(self, parts: Sequence[tuple[StoredWeight, int, int]]) -> list[npt.NDArray[Any]]:
        """Read some numbers of some tensors, those of one file together.

        Args:
            parts: Tensors of a type that is known here, each with where the numbers begin in it and how many
                they are, counted in numbers.

        Returns:
            The numbers of each part; those of 8 bits without the scales that may stand beside them.

        Raises:
            SourceError: They cannot be read.
        """
        spans: dict[str, list[Span]] = defaultdict(list)
        for weight, offset, length in parts:
            size = ITEM_BITS[weight.dtype] // 8
            spans[weight.file].append((weight.span[0] + offset * size, length * size))
        files = list(spans)
        found = for_each(self.reader, files, lambda file: self.reader.read_many(file, spans[file]))
        read = dict(zip(files, map(iter, found), strict=True))
        return [_DECODERS[weight.dtype](next(read[weight.file])) for weight, _, _ in parts]

    def _has_some(self, architecture: Architecture, layer: int) -> bool:
        """Whether a layer's output projection is stored in any form."""
        inside = f"{layer}.{architecture.output_projection}."
        starts = tuple(f"{path}.{inside}" for path in _suffixes(architecture.layers))
        within = f".{architecture.layers.rsplit('.', 1)[-1]}.{inside}"
        return any(name.startswith(starts) or within in name for name in self.tensors)


def read_stored_weights(reader: ArtifactReader, folder: str) -> StoredWeights | None:
    """Read which tensors are in which file of a model's folder, as ``transformers`` chooses the files.

    Args:
        reader: The artifacts.
        folder: The folder of the model in them.

    Returns:
        The tensors; ``None`` where there is neither ``model.safetensors`` nor an index of shards.

    Raises:
        SourceError: A file is missing, damaged, or not what the index says.
    """
    sizes = {file.path: file.size for file in reader.files()}
    single, index = f"{folder}/{SINGLE_FILE}", f"{folder}/{INDEX_FILE}"
    if single in sizes:
        return StoredWeights(reader, dict(_tensors(reader, single, sizes[single])))
    if index not in sizes:
        return None
    places = _places(reader, index, sizes[index])
    tensors: dict[str, StoredWeight] = {}
    for shard in sorted(set(places.values())):
        path = f"{folder}/{shard}"
        if PurePosixPath(shard).name != shard or path not in sizes:
            raise SourceError(
                f"{index!r} at {reader.location} names the file {shard!r}, and that is not there.",
                next_step=COPY_AGAIN,
            )
        for name, tensor in _tensors(reader, path, sizes[path]):
            if name in tensors:
                raise SourceError(
                    f"The tensor {name!r} at {reader.location} is in {tensors[name].file!r} and in {path!r}.",
                    next_step=COPY_AGAIN,
                )
            tensors[name] = tensor
    for name, shard in places.items():
        if name not in tensors or tensors[name].file != f"{folder}/{shard}":
            raise SourceError(
                f"{index!r} at {reader.location} says that tensor {name!r} is in {shard!r}, and it is not.",
                next_step=COPY_AGAIN,
            )
    return StoredWeights(reader, tensors)


def _tensors(reader: ArtifactReader, path: str, size: int) -> Iterator[tuple[str, StoredWeight]]:
    header = read_header(reader, path, size)
    for name, span in header.tensors.items():
        dtype, shape = header.kinds[name]
        bits = ITEM_BITS.get(dtype)
        if bits is None or (math.prod(shape) * bits + 7) // 8 != span[1]:
            raise SourceError(
                f"The file {path!r} at {reader.location} says that {name!r} is {dtype} {list(shape)}, and "
                f"has {span[1]} bytes for it.",
                next_step=COPY_AGAIN,
            )
        yield name, StoredWeight(path, dtype, shape, span)


def _places(reader: ArtifactReader, path: str, size: int) -> dict[str, str]:
    if size > MAX_INDEX_BYTES:
        raise SourceError(f"The file {path!r} at {reader.location} is too large for an index: {size} bytes.")
    try:
        index: Any = json.loads(reader.read(path))
    except ValueError as error:
        raise SourceError(
            f"The file {path!r} at {reader.location} is not JSON: {error}.", next_step=COPY_AGAIN
        ) from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(file, str) for file in places.values())
    ):
        raise SourceError(
            f"The file {path!r} at {reader.location} does not say which tensor is in which file.",
            next_step=COPY_AGAIN,
        )
    return places


def _suffixes(path: str) -> Iterator[str]:
    names = path.split(".")
    return (".".join(names[start:]) for start in range(len(names)))


def _from_bfloat16(data: bytes) -> npt.NDArray[np.float32]:
    return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


def _from_float8(data: bytes) -> npt.NDArray[np.float32]:
    """Numbers of type e4m3fn, without the scales that may stand beside them."""
    codes = np.frombuffer(data, dtype=np.uint8).astype(np.int32)
    exponents, mantissas = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(8 + mantissas, exponents - 10)
    sizes = np.where(exponents > 0, normal, np.ldexp(mantissas, -9))
    return np.asarray(np.where(codes & 0x80, -sizes, sizes), dtype=np.float32)


_DECODERS: Mapping[str, Callable[[bytes], npt.NDArray[Any]]] = {
    "F64": lambda data: np.frombuffer(data, dtype="<f8"),
    "F32": lambda data: np.frombuffer(data, dtype="<f4"),
    "F16": lambda data: np.frombuffer(data, dtype="<f2"),
    "BF16": _from_bfloat16,
    "F8_E4M3": _from_float8,
}
"""What makes numbers of the bytes of a type."""
