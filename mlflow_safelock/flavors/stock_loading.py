"""Whether MLflow loads a logged model from the weights that are stored in it, and by classes of transformers.

What is examined before a promotion is what is stored. An MLmodel file or a configuration may say that it is
loaded otherwise: from another folder, from a hub, from another file, with an adapter on top, or by code that
lies beside it, which may do anything, such as take a lock off again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from mlflow_safelock.errors import SourceError
from mlflow_safelock.provenance import ArtifactReader

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
WEIGHTS_KEY = "transformers_weights"
"""Key of ``config.json`` by which transformers 5 takes the weights from a file of that name."""

OPTIONS_FILE = "components/inference_config.txt"
"""Where older models have the options that they are asked with, and MLflow still reads them."""

_RENAMING = ("attribute_map",)
"""Keys of ``config.json`` by which transformers finds another key under a name."""

_RUNNING_CODE = frozenset({"custom_generate", "trust_remote_code"})
"""Options of ``transformers`` by which it runs code that is not its own."""

_ANEW = "Log it anew from what is to be served: mlflow.transformers.log_model."

_ELSEWHERE = ("local_base_model_path", "source_model_revision")
"""Keys in MLmodel for which MLflow looks neither at what is stored nor at whether anything is."""


def check_stock_loading(reader: ArtifactReader, described: Mapping[str, Any]) -> None:
    """Refuse a model that would be loaded from other weights than its own, or by code of its own.

    Args:
        reader: The folder of a model that was logged with its weights.
        described: Its MLmodel file, with a transformers flavor.

    Raises:
        SourceError: It would be, and by what; or a file cannot be read.
    """
    check_stock_code(reader, described)
    for why, next_step in _other_weights(reader, described["flavors"]["transformers"]):
        raise SourceError(f"The model at {reader.location} {why}.", next_step=next_step)


def check_stock_code(reader: ArtifactReader, described: Mapping[str, Any]) -> None:
    """Refuse a model, or an adapter, that would be loaded or asked by code of its own.

    Raises:
        SourceError: It would be, and by what; or a file cannot be read.
    """
    flavors = described["flavors"]
    generic = flavors.get("python_function") or {}
    if generic.get("data"):
        raise SourceError(
            f"The model at {reader.location} is loaded from the folder {generic['data']!r} in it, as its "
            "MLmodel file says (data), and not from its own weights.",
            next_step=_ANEW,
        )
    for key, name in _classes(flavors["transformers"]):
        if not _is_of_transformers(name):
            raise SourceError(
                f"The model at {reader.location} is loaded by code of its own, which may do anything: {key} "
                f"in its MLmodel file is {name!r}, and transformers has no such class.",
                next_step="Log it with classes of transformers itself; a newer transformers may have them.",
            )
    for place, options in _options(reader, described):
        for option in sorted(_RUNNING_CODE & set(_set_in(options))):
            raise SourceError(
                f"The model at {reader.location} is asked by code of its own, which may do anything: "
                f"{option} is among the options in {place}.",
                next_step="Log it without that option.",
            )


def _other_weights(reader: ArtifactReader, flavor: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in _ELSEWHERE:
        if key in flavor:
            yield f"is not loaded from its own weights, but from what {key} in its MLmodel file names", _ANEW
    folder = str(flavor.get("model_binary", ""))
    paths = {file.path for file in reader.files()}
    if f"{folder}/{ADAPTER_CONFIG_FILE}" in paths:
        yield (
            f"has an {ADAPTER_CONFIG_FILE} beside its weights, so that an adapter is loaded on top of them",
            "Merge the adapter before logging (model.merge_and_unload()), or log it without that file.",
        )
    path = f"{folder}/{CONFIG_FILE}"
    config = _read_json(reader, path) if path in paths else {}
    for key in sorted({WEIGHTS_KEY, *_RENAMING} & set(_set_in(config))):
        yield f"may take its weights from another file, by {key} in its {CONFIG_FILE}", _ANEW
    classes = config.get("architectures")
    named = [flavor.get("pipeline_model_type"), *(classes if isinstance(classes, list) else ())]
    others = [name for name in named if not _is_for(name, str(config.get("model_type")))]
    if others:
        yield (
            f"would be loaded as {others[0]!r}, and its {CONFIG_FILE} says that it is a "
            f"{config.get('model_type')!r}, of which transformers has other classes",
            _ANEW,
        )


def _options(reader: ArtifactReader, described: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Where options are that a model is asked with though nobody names them, and what they are."""
    yield "its MLmodel file (config)", described["flavors"].get("python_function", {}).get("config")
    signature = described.get("signature")
    declared = signature.get("params") if isinstance(signature, Mapping) else None
    try:
        params = json.loads(declared) if isinstance(declared, str) else declared
    except ValueError as error:
        raise SourceError(
            f"The signature of the model at {reader.location} is not JSON: {error}.", next_step=_ANEW
        ) from error
    if params is not None and not isinstance(params, list):
        raise SourceError(
            f"The params in the signature of the model at {reader.location} are no list.", next_step=_ANEW
        )
    named = (one for one in params or () if isinstance(one, Mapping))
    yield "its signature", {str(one.get("name")): one.get("default") for one in named}
    if OPTIONS_FILE in {file.path for file in reader.files()}:
        yield OPTIONS_FILE, _read_json(reader, OPTIONS_FILE)


def _set_in(options: Any) -> Iterator[str]:
    """The names of options that are set, also of those within others."""
    if isinstance(options, Mapping):
        for name, value in options.items():
            if value:
                yield str(name)
            yield from _set_in(value)
    elif isinstance(options, list):
        for value in options:
            yield from _set_in(value)


def _classes(flavor: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The classes that MLflow loads a model and what belongs to it with, by their keys."""
    # MLflow goes through whatever is there, such as the keys of a mapping.
    components = flavor.get("components") or ()
    names = [str(name) for name in components] if isinstance(components, Iterable) else [str(components)]
    keys = ("pipeline_model_type", *(f"{name}_type" for name in names))
    yield from ((key, flavor.get(key)) for key in keys)
    if "processor_type" in flavor:
        yield "processor_type", flavor["processor_type"]


def _is_of_transformers(name: Any) -> bool:
    """Whether MLflow would find a class there; asking for one loads its module, so most are looked up."""
    import transformers

    return isinstance(name, str) and (name in _names() or hasattr(transformers, name))


def _is_for(name: Any, model_type: str) -> bool:
    """Whether a class is one of those that transformers has for a type of model, or chooses one of them.

    Of a type that it does not know nothing is told here: where its heads are is not known either.
    """
    known = _classes_for(model_type)
    return isinstance(name, str) and (name.startswith("Auto") or name in known or not known)


@cache
def _classes_for(model_type: str) -> frozenset[str]:
    """The classes of transformers for a type of model, by its own tables."""
    from transformers.models.auto import modeling_auto

    found: set[str] = set()
    for table in (
        vars(modeling_auto)[name] for name in dir(modeling_auto) if name.endswith("_MAPPING_NAMES")
    ):
        names = table.get(model_type, ())
        found.update([names] if isinstance(names, str) else names)
    return frozenset(found)


@cache
def _names() -> frozenset[str]:
    import transformers

    return frozenset(dir(transformers))


def _read_json(reader: ArtifactReader, path: str) -> dict[str, Any]:
    try:
        values = json.loads(reader.read(path))
    except ValueError as error:
        where = f"The file {PurePosixPath(path).name!r} at {reader.location}"
        raise SourceError(f"{where} is not JSON: {error}.", next_step=_ANEW) from error
    return values if isinstance(values, dict) else {}
