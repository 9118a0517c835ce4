"""Proof that a locked checkpoint is locked, without loading it: for models too big to load.

What stock ``transformers`` builds of the configuration is looked at, without memory for its weights: a flag
that is accepted and ignored, as GLM's is, shows there. The rest is bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from mlflow_safelock.apply.checkpoint.biases import Biases
from mlflow_safelock.apply.checkpoint.header import read_header
from mlflow_safelock.apply.checkpoint.layout import BIAS_FILE
from mlflow_safelock.apply.checkpoint.reload import Confirmation
from mlflow_safelock.apply.checkpoint.source import CheckpointSource
from mlflow_safelock.apply.checkpoint.weights import INDEX_FILE, StoredWeights, read_weights
from mlflow_safelock.apply.checkpoint.writing import Patch, WrittenFile
from mlflow_safelock.errors import CheckpointError

_BLOCK = 1 << 20


def confirm_by_structure(
    source: CheckpointSource, written: Iterable[WrittenFile], biases: Biases, folder: Path
) -> Confirmation:
    """Compare a locked checkpoint with its source, file by file.

    Every tensor must be the source's byte for byte, but for the biases, and those must be the ones computed;
    headers and index must be sound; and the model that ``transformers`` builds of the configuration must have
    a place of the right shape for every bias.

    Args:
        source: The unlocked checkpoint.
        written: Its files of weights, as they are in the locked one.
        biases: What was added and replaced.
        folder: The locked checkpoint.

    Raises:
        CheckpointError: It is not as it should be.
    """
    is_same = []
    for file in written:
        is_same.append(_compare_file(source.layout.model / file.source, folder / file.name, file.patches))
        _compare_headers(source.layout.model / file.source, folder / file.name)
    found = read_weights(folder)
    _compare_names(source.weights, found, biases)
    _check_index(found)
    everything = {**biases.added, **biases.replaced}
    _compare_biases(found, everything)
    _check_places(folder, {name: tuple(bias.shape) for name, bias in everything.items()})
    return Confirmation(
        kind="structure",
        check=structure_in_words(_comparison(is_same)),
        max_logit_difference=None,
        max_logit_change=None,
    )


def structure_in_words(weights: str) -> str:
    """The check in words.

    Args:
        weights: How the files of weights were compared with the source's.
    """
    return (
        f"structure, not loaded: {weights}; biases are those computed; headers and index checked; "
        f"transformers {transformers.__version__} builds a model with a place for every bias"
    )


def _comparison(is_same: Sequence[bool]) -> str:
    own, compared = "the source's own (hard links)", "compared byte for byte with the source's"
    if all(is_same):
        return f"files of weights are {own}"
    if not any(is_same):
        return f"files of weights {compared}"
    return f"{sum(is_same)} files of weights are {own}, {len(is_same) - sum(is_same)} {compared}"


def _compare_file(source: Path, locked: Path, patches: tuple[Patch, ...]) -> bool:
    """Compare two files but for the patches; whether it is one file under two names, and so the same."""
    if source.samefile(locked):
        return True
    size = source.stat().st_size
    starts = [0, *(patch.end for patch in patches)]
    ends = [*(patch.begin for patch in patches), size]
    same = locked.stat().st_size == size
    with source.open("rb") as before, locked.open("rb") as after:
        for start, end in zip(starts, ends, strict=True):
            before.seek(start)
            after.seek(start)
            for place in range(start, end, _BLOCK):
                length = min(_BLOCK, end - place)
                same = same and before.read(length) == after.read(length)
        for patch in patches:
            before.seek(patch.begin)
            same = same and before.read(len(patch.before)) == patch.before
    if not same:
        raise CheckpointError(
            f"{locked.name} is not what {source} is.",
            next_step="Check the disk, and lock the fine-tune again.",
        )
    return False


def _compare_headers(source: Path, locked: Path) -> None:
    if read_header(source) != read_header(locked):
        raise CheckpointError(f"{locked.name} has another header than {source}.")


def _compare_names(source: StoredWeights, found: StoredWeights, biases: Biases) -> None:
    expected = {name: (tensor.code, tensor.shape) for name, tensor in source.tensors.items()}
    there = {name: (tensor.code, tensor.shape) for name, tensor in found.tensors.items()}
    added = {name for name, tensor in found.tensors.items() if tensor.file == BIAS_FILE}
    if added != set(biases.added):
        raise CheckpointError(f"{BIAS_FILE} does not hold the biases that it should.")
    if {name: what for name, what in there.items() if name not in added} != expected:
        raise CheckpointError(f"{found.folder} does not hold the tensors that its source holds.")


def _check_index(found: StoredWeights) -> None:
    if not (found.folder / INDEX_FILE).is_file():
        return
    places = json.loads((found.folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
    if places != {name: tensor.file for name, tensor in found.tensors.items()}:
        raise CheckpointError(f"{INDEX_FILE} does not say of every tensor which file it is in.")
    size = sum((found.folder / file).stat().st_size for file in found.files)
    size -= sum(read_header(found.folder / file).start for file in found.files)
    if found.metadata.get("total_size") != size:
        raise CheckpointError(
            f"{INDEX_FILE} says {found.metadata.get('total_size')} bytes, and it is {size}."
        )


def _compare_biases(found: StoredWeights, expected: Mapping[str, torch.Tensor]) -> None:
    together = load_file(found.folder / BIAS_FILE) if BIAS_FILE in found.files else {}
    for name, bias in expected.items():
        values = together[name] if name in together else found.read(name)
        if values.dtype != bias.dtype or not torch.equal(values, bias):
            raise CheckpointError(f"{name} is stored with other numbers than were computed.")


def _check_places(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except Exception as error:  # each model class has its own ways to reject a configuration
        raise CheckpointError(
            f"transformers cannot build a model of {folder / 'config.json'}: {error}"
        ) from error
    places = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    prefix = f"{model.base_model_prefix}."
    for name, shape in shapes.items():
        # Some checkpoints, such as GPT-2's own, name their tensors from the bare model on.
        if places.get(name, places.get(prefix + name)) != shape:
            raise CheckpointError(
                f"transformers {transformers.__version__} builds a model without a place for {name}: it "
                "would drop the lock on loading.",
                next_step="Lock it in memory (apply_lock), or promote it with the overlay carrier.",
            )
