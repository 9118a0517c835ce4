"""What preparing a standalone model on S3 reads, for the published locks at their bases' real shapes.

Nothing is stored: a folder answers with the headers that the models really have, and zeros, and counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mlflow_safelock import import_published_lock
from mlflow_safelock.apply.architectures import architecture_of
from mlflow_safelock.lock import AttentionGeometry
from mlflow_safelock.provenance import ArtifactFile, Span, take_fingerprint
from mlflow_safelock.registry.derived import locked_projections, weights_spans

pytestmark = pytest.mark.shared

SHARD_BYTES = 5_000_000_000
GOAL = 0.03
PASSES = 3
"""How often blocks are read: for the fingerprint, to compare the copies, and when the model is read back."""


@dataclass(frozen=True)
class Base:
    """The shape of a base model: heads, the width of its MLP, its vocabulary, and its bytes in bfloat16."""

    geometry: AttentionGeometry
    intermediate: int
    vocabulary: int
    size: float


def base(layers: int, heads: int, hidden: int, intermediate: int, vocabulary: int, size: float) -> Base:
    geometry = AttentionGeometry(layers=layers, heads=heads, head_dim=128, hidden=hidden)
    return Base(geometry, intermediate, vocabulary, size)


LLAMA_8B = base(32, 32, 4096, 14336, 128_256, 16.06e9)
LLAMA_70B = base(80, 64, 8192, 28672, 128_256, 141.1e9)
NEMO = base(40, 32, 5120, 14336, 131_072, 24.5e9)
LARGE = base(88, 96, 12288, 28672, 32_768, 245.2e9)

LOCKS = {
    "Meta-Llama-3-8B-Instruct": (LLAMA_8B, 0.0251),
    "Meta-Llama-3__1-8B-Instruct": (LLAMA_8B, 0.0251),
    "Meta-Llama-3-70B-Instruct": (LLAMA_70B, 0.0152),
    "Meta-Llama-3-70B-Instruct_48": (LLAMA_70B, 0.0200),
    "Meta-Llama-3__1-70B-Instruct": (LLAMA_70B, 0.0133),
    "Mistral_Nemo_12B": (NEMO, 0.0205),
    "Mistral_large_123B": (LARGE, 0.0160),
}
"""Base of each lock, and the share of it that its projections are, as the page states it."""


def shapes_of(model: Base) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width = model.geometry.hidden, model.geometry.heads * 128
    yield "model.embed_tokens.weight", (model.vocabulary, hidden)
    for layer in range(model.geometry.layers):
        path = f"model.layers.{layer}"
        yield f"{path}.input_layernorm.weight", (hidden,)
        yield f"{path}.mlp.down_proj.weight", (hidden, model.intermediate)
        yield f"{path}.mlp.gate_proj.weight", (model.intermediate, hidden)
        yield f"{path}.mlp.up_proj.weight", (model.intermediate, hidden)
        yield f"{path}.post_attention_layernorm.weight", (hidden,)
        yield f"{path}.self_attn.k_proj.weight", (8 * 128, hidden)
        yield f"{path}.self_attn.o_proj.weight", (hidden, width)
        yield f"{path}.self_attn.q_proj.weight", (width, hidden)
        yield f"{path}.self_attn.v_proj.weight", (8 * 128, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (model.vocabulary, hidden)


@dataclass
class Counted:
    """A folder with the headers of a model, and zeros; it counts what is read of it."""

    headers: dict[str, bytes]
    sizes: dict[str, int]
    location: str = "counted"
    parallel_files: int = 1
    bytes_read: int = field(default=0)

    def files(self) -> tuple[ArtifactFile, ...]:
        return tuple(ArtifactFile(path, size) for path, size in self.sizes.items())

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        end = self.sizes[path] if length is None else start + length
        self.bytes_read += end - start
        return self.headers[path][start:end].ljust(end - start, b"\0")

    def read_many(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        return [self.read(path, *span) for span in spans]


def folder_of(model: Base) -> Counted:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, shape in shapes_of(model):
        size = bytes_of(shape)
        if size > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= size
    headers, sizes = {}, {}
    for number, shard in enumerate(shards):
        path, place, entries = f"model-{number:05}.safetensors", 0, {}
        for name, shape in shard.items():
            end = place + bytes_of(shape)
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, end]}
            place = end
        text = json.dumps(entries).encode()
        headers[path] = len(text).to_bytes(8, "little") + text
        sizes[path] = len(headers[path]) + place
    return Counted(headers, sizes)


def bytes_of(shape: tuple[int, ...]) -> int:
    return 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)


@pytest.mark.parametrize("name", LOCKS)
def test_less_than_three_percent_of_each_base_is_read(name: str, shared: Path) -> None:
    model, stated = LOCKS[name]
    lock = import_published_lock(
        shared / "data" / "published_locks" / f"{name}.safelock", base_model="a/base", geometry=model.geometry
    )
    folder = folder_of(model)
    size = sum(folder.sizes.values())
    assert size == pytest.approx(model.size, rel=0.003)
    locked = locked_projections(architecture_of({"model_type": "llama"}), lock)
    wanted = sum(length for file in folder.files() for _, length in weights_spans(folder, file, locked))
    folder.bytes_read = 0
    take_fingerprint(folder)
    share = (wanted + PASSES * folder.bytes_read) / size
    projections = len(lock.layers) * 2 * model.geometry.hidden * model.geometry.heads * 128 / size
    assert projections == pytest.approx(stated, abs=5e-5)
    assert projections < share < projections + 0.001
    assert share < GOAL
