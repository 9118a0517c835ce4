"""The weights of a fine-tune as they are stored: whether they are whole, and how alike they are to a base.

Only the index and the headers are read, and, for kinship, the few runs of numbers that a lock's sketch names:
what that costs does not grow with the model.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_safelock.apply.architectures import Architecture
from mlflow_safelock.errors import SourceError
from mlflow_safelock.flavors.stored_json import read_json
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

_SENSES = re.compile("vision|visual|image|video|audio|speech|projector|connector|resampler")
"""In what the names of tensors begin with, of the parts of a model by which it sees or hears, and of those
that lead from there to the part that writes."""


def is_of_senses(beginning: str) -> bool:
    """Whether a tensor whose name begins so belongs to a part of the model that does not write."""
    return _SENSES.search(beginning) is not None


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
    _found: dict[str, dict[int, dict[str, list[str]]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def output_projection(self, architecture: Architecture, layer: int) -> StoredWeight | None:
        """The weight of a layer's attention output projection; ``None`` where it is stored otherwise.

        Raises:
            SourceError: It is stored under several names, of which ``transformers`` takes any.
        """
        beginning = self._beginning(architecture, layer)
        name = f"{beginning}{_list_of(architecture)}.{layer}.{architecture.output_projection}.weight"
        return None if beginning is None else self.tensors.get(name)

    def _beginning(self, architecture: Architecture, layer: int) -> str | None:
        """What the names of a layer's tensors begin with; ``None`` where it has no output projection.

        Raises:
            SourceError: There are several such layers.
        """
        inside = f"{architecture.output_projection}."
        layers = self._layers(_list_of(architecture))
        found = sorted(
            {
                beginning
                for name, beginnings in layers.get(layer, {}).items()
                if name.startswith(inside)
                for beginning in beginnings
            }
        )
        if len(found) > 1:
            names = [f"{beginning}{_list_of(architecture)}.{layer}.{inside}*" for beginning in found]
            raise self._several(f"attention output projection of layer {layer}", names)
        return found[0] if found else None

    def _layers(self, list_of_layers: str) -> dict[int, dict[str, list[str]]]:
        """What is in each layer, by number and name inside it: what the names begin with.

        Checkpoints name their tensors from the bare model on, or put more before it, and ``transformers``
        folds many names into its own. So a tensor is known by how its name ends, whatever it begins with;
        those of the parts that see or hear are left out, which may have layers of the same kind.
        """
        if list_of_layers not in self._found:
            ending = re.compile(rf"(.*){re.escape(list_of_layers)}\.(0|[1-9][0-9]{{0,5}})\.(.+)", re.DOTALL)
            layers: dict[int, dict[str, list[str]]] = {}
            for name in self.tensors:
                parts = ending.fullmatch(name)
                if parts is not None and not is_of_senses(parts[1]):
                    layers.setdefault(int(parts[2]), {}).setdefault(parts[3], []).append(parts[1])
            self._found[list_of_layers] = layers
        return self._found[list_of_layers]

    def biases(
        self, architecture: Architecture, geometry: AttentionGeometry, paths: Collection[str]
    ) -> dict[int, dict[str, npt.NDArray[np.float64]]]:
        """The biases of some modules of each layer; layers without any are left out.

        Args:
            architecture: Where the layers are.
            geometry: The model's attention shape.
            paths: The paths of the modules inside a layer, such as ``self_attn.o_proj``.

        Returns:
            By layer and by path, float64 of shape ``[outputs]``, and of experts ``[experts, outputs]``.

        Raises:
            SourceError: They cannot be read, are of a type that is not known here, or are stored under
                several names, or apart from the layer, of which ``transformers`` takes any.
        """
        places: dict[tuple[int, str], str] = {}
        list_of_layers = _list_of(architecture)
        layers = self._layers(list_of_layers)
        for layer in range(geometry.layers):
            inside = layers.get(layer, {})
            for path in paths:
                # Those of experts are one parameter, beside their weights.
                found = [
                    f"{beginning}{list_of_layers}.{layer}.{name}"
                    for name in (f"{path}.bias", f"{path}_bias")
                    for beginning in inside.get(name, ())
                ]
                if len(found) > 1:
                    raise self._several(f"bias of {path} in layer {layer}", sorted(found))
                if found:
                    places[layer, path] = found[0]
                    if not found[0].startswith(f"{self._beginning(architecture, layer)}{list_of_layers}."):
                        raise SourceError(
                            f"The weights at {self.reader.location} have the bias {found[0]!r}, and the "
                            f"attention output projection of layer {layer} is not beside it.",
                            next_step=COPY_AGAIN,
                        )
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
        vectors = [
            _DECODERS[one.dtype](next(read[one.file])).astype(np.float64).reshape(one.shape)
            for one in stored_ones
        ]
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
            if weight is None and self._beginning(architecture, layer) is None:
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
    places = _places(reader, index)
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


def _places(reader: ArtifactReader, path: str) -> dict[str, str]:
    places = read_json(reader, path, MAX_INDEX_BYTES).get("weight_map")
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


def _list_of(architecture: Architecture) -> str:
    """The name of the list of layers."""
    return architecture.layers.rpartition(".")[2]


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
