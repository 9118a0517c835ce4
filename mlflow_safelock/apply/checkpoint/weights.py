"""The weights of a checkpoint in safetensors: which tensor is in which file, and slices of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mlflow_safelock.apply.checkpoint.layout import MERGE_FIRST, checked_name
from mlflow_safelock.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: Name of the file.
        code: Its dtype as safetensors writes it, such as ``BF16``.
        shape: Its dimensions.
    """

    file: str
    code: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """Its dtype, or ``None`` for one that is not a plain floating point number of 16 bits or more."""
        return _DTYPES.get(self.code)

    @property
    def row_bytes(self) -> int:
        """Bytes from the beginning of a row to that of the next."""
        return math.prod(self.shape[1:]) * (self.dtype.itemsize if self.dtype else 1)


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a checkpoint, unread.

    Attributes:
        folder: The folder that they are in.
        tensors: Every tensor, by name.
        metadata: The ``metadata`` of the index; empty where there is no index.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, Any]

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files, sorted."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum((self.folder / file).stat().st_size for file in self.files)

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """Open a tensor for reading slices of it; only what is sliced is read.

        Raises:
            CheckpointError: The file cannot be read.
        """
        with _opened(self.folder / self.tensors[name].file) as file:
            yield file.get_slice(name)

    def read(self, name: str) -> torch.Tensor:
        """Read a whole tensor.

        Raises:
            CheckpointError: The file cannot be read.
        """
        with _opened(self.folder / self.tensors[name].file) as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor.clone()


def read_weights(folder: Path) -> StoredWeights:
    """Read the headers of a checkpoint's weights, as ``transformers`` would choose the files.

    Raises:
        CheckpointError: There are none in safetensors, a file is missing or damaged, or they are the weights
            of a model with adapters that were not merged.
    """
    metadata: dict[str, Any] = {}
    if (folder / SINGLE_FILE).is_file():
        tensors = _headers(folder / SINGLE_FILE)
    elif (folder / INDEX_FILE).is_file():
        tensors, metadata = _sharded(folder)
    else:
        raise CheckpointError(_no_weights(folder), next_step=_CONVERT)
    adapted = next((name for name in tensors if ".base_layer." in name or ".lora_A." in name), None)
    if adapted is not None:
        raise CheckpointError(
            f"{folder} holds a PEFT model that was not merged (it has {adapted!r}), and transformers loads "
            "that with random weights in place of the adapted ones.",
            next_step=MERGE_FIRST,
        )
    return StoredWeights(folder, tensors, metadata)


_CONVERT = "Convert them: load the fine-tune and save it with save_pretrained, which writes safetensors."


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: There is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(values, ensure_ascii=False).encode()  # an escape may spell half of a character
    except (OSError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return values


def _no_weights(folder: Path) -> str:
    pickled = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickled:
        return f"{folder} holds pickled weights ({pickled[0]}), which can run code when they are read."
    return f"{folder} holds no weights in safetensors."


def _sharded(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    path = folder / INDEX_FILE
    index = read_object(path)
    places, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(places, dict) or not places or not isinstance(metadata, dict):
        raise CheckpointError(f"{path} does not say which tensor is in which file.")
    files = {str(file) for file in places.values()}
    for file in sorted(files):
        if Path(checked_name(file)).name != file:
            raise CheckpointError(f"{path} names {file!r}, which is not a file of its folder.")
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{path} names {file!r}, and that file is missing.", next_step="Copy the fine-tune again."
            )
    tensors = {name: tensor for file in sorted(files) for name, tensor in _headers(folder / file).items()}
    for name, file in places.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(f"{path} says that {name!r} is in {file!r}, and it is not.")
    return tensors, metadata


def _headers(path: Path) -> dict[str, StoredTensor]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        return {
            name: StoredTensor(path.name, tensor.get_dtype(), tuple(tensor.get_shape()))
            for name, tensor in slices.items()
        }


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.exists() and not os.access(path, os.R_OK):  # of which safetensors says that there is none
        raise CheckpointError(
            f"{path} cannot be read: permission denied.", next_step="Let this process read it."
        )
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file: {error}.", next_step="Copy the fine-tune again."
        ) from error
