"""Whether MLflow loads a logged model from the weights that are stored in it, and by classes of transformers.

What is examined before a promotion is what is stored. An MLmodel file or a configuration may say that it is
loaded otherwise: from another folder, from a hub, from another file, with an adapter on top, or by code that
lies beside it, which may do anything, such as take a lock off again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from mlflow_safelock.errors import SourceError
from mlflow_safelock.provenance import ArtifactReader

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
WEIGHTS_KEY = "transformers_weights"
"""Key of ``config.json`` by which transformers 5 takes the weights from a file of that name."""

_ELSEWHERE = ("local_base_model_path", "source_model_revision")
"""Keys in MLmodel for which MLflow looks neither at what is stored nor at whether anything is."""


def check_stock_loading(reader: ArtifactReader, flavor: Mapping[str, Any]) -> None:
    """Refuse a model that would be loaded from other weights than its own, or by code of its own.

    Args:
        reader: The folder of a model that was logged with its weights.
        flavor: Its transformers flavor, as its MLmodel file has it.

    Raises:
        SourceError: It would be, and by what; or a file cannot be read.
    """
    for why, next_step in _reasons(reader, flavor):
        raise SourceError(f"The model at {reader.location} {why}.", next_step=next_step)


def check_stock_classes(reader: ArtifactReader, flavor: Mapping[str, Any]) -> None:
    """Refuse a model, or an adapter, that would be loaded by code of its own.

    Raises:
        SourceError: It would be.
    """
    for key, name in _classes(flavor):
        if not _is_of_transformers(name):
            raise SourceError(
                f"The model at {reader.location} is loaded by code of its own, which may do anything: {key} "
                f"in its MLmodel file is {name!r}, and transformers has no such class.",
                next_step="Log it with classes of transformers itself; a newer transformers may have them.",
            )


def _reasons(reader: ArtifactReader, flavor: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    anew = "Log it anew from what is to be served: mlflow.transformers.log_model."
    for key in _ELSEWHERE:
        if key in flavor:
            yield f"is not loaded from its own weights, but from what {key} in its MLmodel file names", anew
    check_stock_classes(reader, flavor)
    folder = str(flavor.get("model_binary", ""))
    paths = {file.path for file in reader.files()}
    if f"{folder}/{ADAPTER_CONFIG_FILE}" in paths:
        yield (
            f"has an {ADAPTER_CONFIG_FILE} beside its weights, so that an adapter is loaded on top of them",
            "Merge the adapter before logging (model.merge_and_unload()), or log it without that file.",
        )
    path = f"{folder}/{CONFIG_FILE}"
    if path in paths and _config(reader, path).get(WEIGHTS_KEY) is not None:
        yield f"takes its weights from the file that {WEIGHTS_KEY} in its {CONFIG_FILE} names", anew


def _classes(flavor: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The classes that MLflow loads a model and what belongs to it with, by their keys."""
    components = flavor.get("components")
    names = [str(name) for name in components] if isinstance(components, list) else []
    keys = ("pipeline_model_type", *(f"{name}_type" for name in names))
    yield from ((key, flavor.get(key)) for key in keys)
    if "processor_type" in flavor:
        yield "processor_type", flavor["processor_type"]


def _is_of_transformers(name: Any) -> bool:
    """Whether MLflow would find a class there; asking for one loads its module, so most are looked up."""
    import transformers

    return isinstance(name, str) and (name in _names() or hasattr(transformers, name))


@cache
def _names() -> frozenset[str]:
    import transformers

    return frozenset(dir(transformers))


def _config(reader: ArtifactReader, path: str) -> dict[str, Any]:
    try:
        config = json.loads(reader.read(path))
    except ValueError as error:
        where = f"The file {PurePosixPath(path).name!r} at {reader.location}"
        raise SourceError(f"{where} is not JSON: {error}.") from error
    return config if isinstance(config, dict) else {}
