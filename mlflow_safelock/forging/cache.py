"""Activations on disk as they are computed: a forge that was cut off goes on where it was.

A cache folder holds one folder for each reading of a model, named by a digest of all that decides the
numbers: the model's configuration and samples of its weights, every token of every chat, and how they were
batched. So a reading of another model, other pairs or another template never finds these numbers, and a forge
that only asks for other heads, another split or seed reads the model not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mlflow_safelock.apply.placement import execution_device
from mlflow_safelock.errors import ForgeError
from mlflow_safelock.forging.answer_tokens import AnswerTokens
from mlflow_safelock.forging.offloaded import offloaded_tensor
from mlflow_safelock.lock import AttentionGeometry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 64
"""Numbers of each parameter that tell one model from another."""

ZEROS = bytes(2**24)
"""What reserves disk space where the file system has no call for it."""


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """Where activations go, and which batches are there.

    Attributes:
        values: float32 ``[chats, last_tokens, layers, heads, head_dim]``.
        done: uint8 ``[batches]``; 1 where a batch's values are complete.
        files: The files behind both, in this order; none in memory.
    """

    values: torch.Tensor
    done: npt.NDArray[np.uint8]
    files: tuple[np.memmap[Any, Any], ...] = ()

    def finish(self, batch: int) -> None:
        """Keep the batch's values, then say so: a batch that is marked is on disk."""
        for file in self.files[:1]:
            file.flush()
        self.done[batch] = 1
        for file in self.files[1:]:
            file.flush()


def store_in_memory(shape: Sequence[int], batches: int) -> ActivationStore:
    """A store that is gone with the process."""
    return ActivationStore(torch.empty(*shape), np.zeros(batches, dtype=np.uint8))


def store_on_disk(
    cache: str | os.PathLike[str], key: str, shape: Sequence[int], batches: int
) -> ActivationStore:
    """The store of a reading, as an earlier process left it, or new.

    Args:
        cache: The cache folder; made where there is none.
        key: What the reading is of; see ``reading_key``.
        shape: Of the values.
        batches: Number of batches.

    Raises:
        ForgeError: It cannot be made, there is no room for it, or what is there has another size.
    """
    folder = Path(cache) / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lost = not (folder / "values.f32").is_file()
        values = _mapped(folder / "values.f32", np.dtype(np.float32), tuple(shape))
        done = _mapped(folder / "done.u8", np.dtype(np.uint8), (batches,))
        if lost:
            done[:] = 0  # nothing is there of what was marked
            done.flush()
        return ActivationStore(torch.from_numpy(values), done, (values, done))
    except (OSError, ValueError) as error:
        raise ForgeError(
            f"The activations cannot be kept in {folder}: {error}.",
            next_step="Make room, choose another folder, or forge without one.",
        ) from error


def reading_key(
    model: PreTrainedModel, geometry: AttentionGeometry, chats: Iterable[AnswerTokens], **settings: object
) -> str:
    """Digest of all that decides the activations of a reading, 64 hexadecimal digits.

    Args:
        model: The model: its configuration, and samples of its weights.
        geometry: Its attention shape.
        chats: What it reads.
        settings: How, such as the size of a batch.

    Raises:
        ForgeError: A weight cannot be read, so this model cannot be told from one that differs in it.
    """
    state = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    about = {
        "config": config,
        "geometry": geometry.model_dump(),
        "torch": torch.__version__,
        "attention": getattr(model.config, "_attn_implementation", None),
        "device": execution_device(model).type,
        "adapters": list(_adapters(model)),
        **settings,
    }
    state.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.state_dict(keep_vars=False).items()):
        stored = _stored(model, name, parameter).detach()
        state.update(f"{name}:{tuple(parameter.shape)}:{parameter.dtype}".encode())
        if parameter.numel():
            step = max(1, parameter.numel() // SAMPLES)
            sample = stored.flatten()[::step][:SAMPLES].to(parameter.dtype)
            state.update(sample.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    for chat in chats:
        state.update(json.dumps([list(chat.token_ids), list(chat.positions)]).encode())
    return state.hexdigest()


def _adapters(model: nn.Module) -> Iterator[object]:
    """What of adapters decides the numbers beside their weights: which are on, merged, and how strong."""
    for name, kind in sorted(getattr(model, "peft_config", {}).items()):
        yield name, kind.to_dict() if hasattr(kind, "to_dict") else str(kind)
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters"):
            found = (module.active_adapters, module.merged_adapters, module.disable_adapters)
            yield name, [str(each) for each in found], str(getattr(module, "scaling", None))


def _stored(model: nn.Module, name: str, entry: object) -> torch.Tensor:
    """The numbers of an entry of the model's state, wherever they are."""
    found = entry if isinstance(entry, torch.Tensor) else None
    if found is not None and found.device.type == "meta":
        found = offloaded_tensor(model, name)
    if found is None:
        raise ForgeError(
            f"The cache cannot tell this model from another: {name}, packed or offloaded, cannot be read.",
            next_step="Forge without a cache, or load the model without quantisation and offloading.",
        )
    return found


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    size = int(np.prod(shape)) * dtype.itemsize
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        found = os.fstat(file.fileno()).st_size
        if found not in (0, size):
            raise ValueError(f"{path} has {found} bytes, and {size} are expected")
        try:
            _reserve(file, found, size)
        except OSError as error:
            if not found:
                file.truncate(0)  # what was reserved before the disk was full is of use to others
            raise OSError(f"{size / 1e9:.3g} GB are needed for {path.name}: {error.strerror}") from error
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)


def _reserve(file: IO[bytes], found: int, size: int) -> None:
    """Make sure of a file's blocks now: on a full disk a write through mapped memory kills the process."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:  # macOS has no such call, and some file systems refuse it
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        if not found:
            for start in range(0, size, len(ZEROS)):
                file.write(ZEROS[: size - start])
            file.flush()
