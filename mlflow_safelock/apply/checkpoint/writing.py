"""The weights of a locked checkpoint: the source's files as they are, and the biases.

Where an architecture has output biases of its own, a lock changes tensors that are there. It would be cheap
to put the new ones into a file of their own and have the index point there, and it would be wrong: loaders
read every tensor of every file that the index names, so a stale bias and a new one would race, and which one
wins depends on names of files and on the loader. So a file with a tensor that changes is copied, and changed
in the copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from mlflow_safelock.apply.checkpoint.biases import Biases
from mlflow_safelock.apply.checkpoint.header import read_header
from mlflow_safelock.apply.checkpoint.layout import BIAS_FILE
from mlflow_safelock.apply.checkpoint.sharing import Sharing, Way, own_file
from mlflow_safelock.apply.checkpoint.weights import INDEX_FILE, SINGLE_FILE, StoredWeights
from mlflow_safelock.errors import CheckpointError

_FIRST_FILE = "model-00001-of-00001.safetensors"


@dataclass(frozen=True)
class Patch:
    """Bytes of a file that were written over in its copy.

    Attributes:
        begin: Where they begin.
        before: What they were.
    """

    begin: int
    before: bytes

    @property
    def end(self) -> int:
        """Where they end."""
        return self.begin + len(self.before)


@dataclass(frozen=True)
class WrittenFile:
    """A file of weights of the source, in the locked checkpoint.

    Attributes:
        source: Its name in the source.
        name: Its name in the locked checkpoint.
        sharing: How it came there.
        patches: What differs.
    """

    source: str
    name: str
    sharing: Sharing
    patches: tuple[Patch, ...]


def write_weights(
    weights: StoredWeights, biases: Biases, folder: Path, share: Way, moved: Callable[[int], None]
) -> tuple[WrittenFile, ...]:
    """Put the weights into ``folder`` with the biases added.

    Files of weights stay as they are, byte for byte. Added tensors go to one file of their own, and an index
    says so; replaced ones are written over in a copy of their file.

    Args:
        weights: The source's weights.
        biases: What is added and replaced.
        folder: The new checkpoint.
        share: Gives a file that does not change its place in the new checkpoint.
        moved: Is told of bytes that are there, now and then.

    Returns:
        The source's files, as they are in the new checkpoint.

    Raises:
        CheckpointError: A file is damaged.
    """
    names = {name: name for name in weights.files}
    if biases.added and SINGLE_FILE in names:
        # transformers would load a file of this name and look at no other.
        names[SINGLE_FILE] = _FIRST_FILE
    changed = {weights.tensors[name].file for name in biases.replaced}
    written = []
    for source, name in names.items():
        place: Way = own_file if source in changed else share
        sharing = place(weights.folder / source, folder / name, moved)
        replaced = {
            tensor: bias for tensor, bias in biases.replaced.items() if weights.tensors[tensor].file == source
        }
        written.append(WrittenFile(source, name, sharing, _patched(folder / name, replaced)))
    if biases.added:
        # Not save_file: its files are readable by their owner alone.
        (folder / BIAS_FILE).write_bytes(save(dict(biases.added), metadata={"format": "pt"}))
    if biases.added or SINGLE_FILE not in names:
        _write_index(weights, names, biases, folder)
    return tuple(written)


def write_over(path: Path, begin: int, data: bytes) -> None:
    """Write bytes over those of a file that has no other name.

    Raises:
        CheckpointError: The file has another name, by which somebody else's would change.
    """
    with path.open("r+b") as file:
        if os.fstat(file.fileno()).st_nlink != 1:
            raise CheckpointError(f"{path} is a hard link, and whatever else links to it would change.")
        file.seek(begin)
        file.write(data)


def _patched(path: Path, replaced: Mapping[str, torch.Tensor]) -> tuple[Patch, ...]:
    """Write tensors over the ones in a safetensors file."""
    patches = []
    spans = read_header(path).spans if replaced else {}
    for name, values in replaced.items():
        data = values.contiguous().view(torch.uint8).numpy().tobytes()
        begin, end = spans.get(name, (0, 0))
        if end - begin != len(data):
            raise CheckpointError(f"{path.name} changed while it was copied.")
        with path.open("rb") as file:
            file.seek(begin)
            patches.append(Patch(begin, file.read(len(data))))
        write_over(path, begin, data)
    return tuple(sorted(patches, key=lambda patch: patch.begin))


def _write_index(weights: StoredWeights, names: Mapping[str, str], biases: Biases, folder: Path) -> None:
    places = {name: names[tensor.file] for name, tensor in weights.tensors.items()}
    places.update(dict.fromkeys(biases.added, BIAS_FILE))
    metadata = dict(weights.metadata)
    metadata["total_size"] = sum(_data_bytes(folder / file) for file in set(places.values()))
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += sum(bias.numel() for bias in biases.added.values())
    index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _data_bytes(path: Path) -> int:
    return path.stat().st_size - read_header(path).start
