"""The configuration of a locked checkpoint: the flag that makes ``transformers`` load its biases."""

from __future__ import annotations

from typing import Any

from mlflow_safelock.apply.checkpoint.biases import has_output_bias
from mlflow_safelock.apply.checkpoint.rewritten import rewritten_type, rewritten_values
from mlflow_safelock.apply.checkpoint.source import CheckpointSource
from mlflow_safelock.apply.config_entry import CONFIG_KEY, config_entry
from mlflow_safelock.lock import SafetyLock


def locked_values(source: CheckpointSource, lock: SafetyLock, alpha: float) -> dict[str, Any]:
    """Contents of the locked checkpoint's ``config.json``: the source's, but for what the biases need.

    Raises:
        UnsupportedArchitectureError: The model cannot be written as the architecture that has the flag.
    """
    entry = {CONFIG_KEY: config_entry(lock, alpha)}
    if has_output_bias(source):
        return {**source.values, **entry}
    if source.architecture.standalone == "rewritten":
        return {**rewritten_values(source.values, source.config, source.geometry), **entry}
    return {**source.values, source.architecture.output_bias: True, **entry}


def carrier_in_words(source: CheckpointSource) -> str:
    """How the checkpoint holds the biases."""
    model_type = source.architecture.model_type
    if has_output_bias(source):
        return f"{model_type}, added to the output projections' own biases"
    if source.architecture.standalone == "rewritten":
        return f"{model_type} written as {rewritten_type(source.config)}, with attention_bias"
    return f"{model_type} with {source.architecture.output_bias}"
