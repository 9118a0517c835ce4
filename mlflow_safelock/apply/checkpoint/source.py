"""The fine-tune that is locked, read as far as that needs: configuration, and headers of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from mlflow_safelock.apply.architectures import Architecture, architecture_of, geometry_from_config
from mlflow_safelock.apply.checkpoint.fp8 import Fp8Scheme, scheme_of, unknown_scheme
from mlflow_safelock.apply.checkpoint.layout import BIAS_FILE, RECORD_FILE, Layout, layout_of
from mlflow_safelock.apply.checkpoint.weights import StoredWeights, read_object, read_weights
from mlflow_safelock.apply.config_entry import refuse_locked_config
from mlflow_safelock.errors import AlreadyLockedError, CheckpointError, UnsupportedArchitectureError
from mlflow_safelock.lock import AttentionGeometry

_CAUSAL_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True, eq=False)
class CheckpointSource:
    """An unlocked checkpoint.

    Attributes:
        layout: Where its files are.
        values: Contents of its ``config.json``.
        config: The same, as ``transformers`` understands it.
        architecture: Its row in the table of architectures.
        geometry: The shape of its attention.
        weights: Its weights.
        fp8: How its weights of eight bits are scaled; ``None`` where it has none.
    """

    layout: Layout
    values: Mapping[str, Any]
    config: PretrainedConfig
    architecture: Architecture
    geometry: AttentionGeometry
    weights: StoredWeights
    fp8: Fp8Scheme | None


def read_source(folder: Path) -> CheckpointSource:
    """Read an unlocked checkpoint without its weights.

    Args:
        folder: A folder that ``save_pretrained`` wrote, or a model folder of ``mlflow.transformers``.

    Raises:
        AlreadyLockedError: It was saved with a lock in it.
        CheckpointError: It is no such folder, is damaged, or holds weights of a kind that cannot be locked:
            adapters, pickles, quantised weights (but for float8_e4m3fn with block scales).
        UnsupportedArchitectureError: It is of no known architecture, or no causal language model.
    """
    try:
        return _read(folder)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{str(folder)!r} cannot be read: {error}.",
            next_step="See that it is a folder, and that this process may read all that is in it.",
        ) from error


def _read(folder: Path) -> CheckpointSource:
    layout = layout_of(folder)
    values = read_object(layout.model / "config.json")
    refuse_locked_config(values, f"The checkpoint {folder}")
    _refuse_locked_files(layout.model)
    _check_kind(values, folder)
    architecture, geometry = architecture_of(values), geometry_from_config(values)
    try:
        config = AutoConfig.from_pretrained(layout.model)
    except Exception as error:  # each configuration class has its own ways to reject values
        raise CheckpointError(f"transformers cannot read {layout.model / 'config.json'}: {error}") from error
    weights, scheme = read_weights(layout.model), scheme_of(values.get("quantization_config"))
    return CheckpointSource(layout, values, config, architecture, geometry, weights, scheme)


def _refuse_locked_files(folder: Path) -> None:
    for name, what in ((BIAS_FILE, "the biases of a lock"), (RECORD_FILE, "what it takes to undo a lock")):
        if (folder / name).exists():
            raise AlreadyLockedError(
                f"{folder} holds {name}, {what}.",
                next_step="Lock the unlocked fine-tune instead; unlock_checkpoint gives it back.",
            )


def _check_kind(values: Mapping[str, Any], folder: Path) -> None:
    method = values.get("quantization_config")
    if method is not None and scheme_of(method) is None:
        name = method.get("quant_method") if isinstance(method, Mapping) else method
        raise unknown_scheme(f"{folder} is quantised ({name})")
    if values.get("auto_map") is not None:
        raise UnsupportedArchitectureError(
            f"{folder} needs code of its own (auto_map), which stock transformers does not have."
        )
    heads = values.get("architectures") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    if not isinstance(heads, list | tuple):
        raise CheckpointError(
            f"config.json in {folder} has the architectures {heads!r}, which is no list of names.",
            next_step="Use the config.json that transformers' save_pretrained writes.",
        )
    if values.get("text_config") is not None or not all(
        str(name).endswith(_CAUSAL_LANGUAGE_MODELS) for name in heads
    ):
        raise UnsupportedArchitectureError(
            f"{folder} is a {', '.join(map(str, heads)) or 'model of several parts'}; a checkpoint can be "
            "written for causal language models only.",
            next_step="Lock it in memory: apply_lock.",
        )
