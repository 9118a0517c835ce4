"""The weights of a locked checkpoint: the source's files as they are, and the biases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from mlflow_safelock.apply.checkpoint.biases import Biases
from mlflow_safelock.apply.checkpoint.folder import copy_file
from mlflow_safelock.apply.checkpoint.weights import INDEX_FILE, SINGLE_FILE, StoredWeights
from mlflow_safelock.errors import AlreadyLockedError, CheckpointError

BIAS_FILE = "model-safelock.safetensors"
"""The file with every tensor that a lock adds."""

_FIRST_FILE = "model-00001-of-00001.safetensors"


def write_weights(weights: StoredWeights, biases: Biases, folder: Path) -> None:
    """Copy the weights to ``folder`` with the biases added.

    Files of weights stay as they are, byte for byte. Added tensors go to one file of their own, and an index
    says so; replaced ones are written over in the copy.

    Args:
        weights: The source's weights.
        biases: What is added and replaced.
        folder: The new checkpoint.

    Raises:
        AlreadyLockedError: The source has a file of added biases.
        CheckpointError: A file is damaged.
    """
    if BIAS_FILE in weights.files:
        raise AlreadyLockedError(
            f"{weights.folder} holds {BIAS_FILE}, the biases of a lock.",
            next_step="Lock the unlocked fine-tune instead.",
        )
    names = {name: name for name in weights.files}
    if biases.added and SINGLE_FILE in names:
        # transformers would load a file of this name and look at no other.
        names[SINGLE_FILE] = _FIRST_FILE
    for name, new_name in names.items():
        copy_file(weights.folder / name, folder / new_name)
    for name, bias in biases.replaced.items():
        _overwrite(folder / names[weights.tensors[name].file], name, bias)
    if biases.added:
        # Not save_file: its files are readable by their owner alone.
        (folder / BIAS_FILE).write_bytes(save(dict(biases.added), metadata={"format": "pt"}))
    if biases.added or SINGLE_FILE not in names:
        _write_index(weights, names, biases, folder)


def _write_index(weights: StoredWeights, names: Mapping[str, str], biases: Biases, folder: Path) -> None:
    places = {name: names[tensor.file] for name, tensor in weights.tensors.items()}
    places.update(dict.fromkeys(biases.added, BIAS_FILE))
    metadata = dict(weights.metadata)
    metadata["total_size"] = sum(_data_bytes(folder / file) for file in set(places.values()))
    if "total_parameters" in metadata:
        metadata["total_parameters"] += sum(bias.numel() for bias in biases.added.values())
    index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _overwrite(path: Path, name: str, values: torch.Tensor) -> None:
    """Write a tensor's values over the ones in a safetensors file."""
    data = values.contiguous().view(torch.uint8).numpy().tobytes()
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
        if end - begin != len(data):
            raise CheckpointError(f"{path.name} changed while it was copied.")
        file.seek(8 + length + begin)
        file.write(data)


def _data_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
