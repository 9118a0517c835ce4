"""Whether MLflow loads a logged model from the weights that are stored in it, and by classes of transformers.

What is examined before a promotion is what is stored. An MLmodel file or a configuration may say that it is
loaded otherwise: from another folder, from a hub, from another file, with an adapter on top, or by code that
lies beside it, which may do anything, such as take a lock off again.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mlflow_safelock.errors import SourceError
from mlflow_safelock.flavors.stored_json import read_json
from mlflow_safelock.provenance import ArtifactReader

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
OTHER_WEIGHTS = ("attribute_map", "configuration_files", "transformers_weights")
"""Keys of ``config.json`` by which transformers finds another key under a name, takes another file for it, or
takes the weights from a file of that name."""

OPTIONS_FILE = "components/inference_config.txt"
"""Where older models have the options that they are asked with, and MLflow still reads them."""

COMPONENTS = ("tokenizer", "feature_extractor", "image_processor", "processor")
"""What MLflow logs beside a model; whatever else is named there, it hands to the pipeline by that name."""

RENAMED_TOKENIZERS = ("BloomTokenizerFast", "MistralCommonTokenizer")
"""Tokenizers of transformers 4 that are called otherwise since: MLflow lets ``AutoTokenizer`` choose."""

_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
"""Files of weights that transformers takes before all others."""

_RUNNING_CODE = frozenset({"custom_generate", "trust_remote_code"})
"""Options of ``transformers`` by which it runs code that is not its own."""

_ANEW = "Log it anew from what is to be served: mlflow.transformers.log_model."

_REPR = reprlib.Repr()
_REPR.maxstring = 200

_ELSEWHERE = ("local_base_model_path", "source_model_revision")
"""Keys in MLmodel for which MLflow looks neither at what is stored nor at whether anything is."""


def read_config(reader: ArtifactReader, described: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model that was logged with its weights; empty where there is none.

    Args:
        reader: Its folder.
        described: Its MLmodel file, with a transformers flavor.

    Raises:
        SourceError: It cannot be read.
    """
    path = f"{_folder(described)}/{CONFIG_FILE}"
    return read_json(reader, path) if path in {file.path for file in reader.files()} else {}


def check_stock_loading(
    reader: ArtifactReader, described: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Refuse a model that would be loaded from other weights than its own, or by code of its own.

    Args:
        reader: The folder of a model that was logged with its weights.
        described: Its MLmodel file, with a transformers flavor.
        config: Its configuration.

    Raises:
        SourceError: It would be, and by what; or a file cannot be read.
    """
    check_stock_code(reader, described)
    for why, next_step in _other_weights(reader, described, config):
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
    components = flavors["transformers"].get("components") or []
    if not isinstance(components, list) or not all(name in COMPONENTS for name in components):
        raise SourceError(
            f"The model at {reader.location} is loaded with more than its own weights: components in its "
            f"MLmodel file is {_brief(components)}, and MLflow logs none but {', '.join(COMPONENTS)}.",
            next_step=_ANEW,
        )
    for key, name in _classes(flavors["transformers"], components):
        if not _is_of_transformers(name) and not _is_renamed(reader, key, name):
            raise SourceError(
                f"The model at {reader.location} is loaded by code of its own, which may do anything: {key} "
                f"in its MLmodel file is {_brief(name)}, and transformers has no such class.",
                next_step="Log it with classes of transformers itself; a newer transformers may have them.",
            )
    for place, options in _options(reader, described):
        for option in sorted(_RUNNING_CODE & set(_set_in(options))):
            raise SourceError(
                f"The model at {reader.location} is asked by code of its own, which may do anything: "
                f"{option} is among the options in {place}.",
                next_step="Log it without that option.",
            )


def refuse_folder_for_base(described: Mapping[str, Any]) -> None:
    """Refuse an adapter whose base would be loaded from a folder, and not from the hub at its commit.

    Args:
        described: The MLmodel file of an adapter that was logged without its base.

    Raises:
        SourceError: There is a folder of the base's name where this process is.
    """
    base = described["flavors"]["transformers"].get("source_model_name")
    if Path(str(base)).exists():
        raise SourceError(
            f"The adapter's base is {base}, and there is a folder of that name here, which would be loaded "
            "in place of the hub's repository.",
            next_step="Load it from another working directory, or take it away. An adapter on a base "
            "in a folder has to be merged: model.merge_and_unload().",
        )


def _brief(value: Any) -> str:
    """What somebody wrote, cut short where it is long, as a value that holds itself many times is."""
    return _REPR.repr(value)


def _folder(described: Mapping[str, Any]) -> str:
    return str(described["flavors"]["transformers"].get("model_binary", ""))


def _other_weights(
    reader: ArtifactReader, described: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    flavor, folder = described["flavors"]["transformers"], _folder(described)
    for key in _ELSEWHERE:
        if key in flavor:
            yield f"is not loaded from its own weights, but from what {key} in its MLmodel file names", _ANEW
    names = {file.path.removeprefix(f"{folder}/") for file in reader.files()}
    if ADAPTER_CONFIG_FILE in names:
        yield (
            f"has an {ADAPTER_CONFIG_FILE} beside its weights, so that an adapter is loaded on top of them",
            "Merge the adapter before logging (model.merge_and_unload()), or log it without that file.",
        )
    for name in sorted(filter(_DISTRIBUTED.fullmatch, names)):
        yield (
            f"has a part of a distributed checkpoint, {name!r}, which is loaded in place of its weights",
            _ANEW,
        )
    for key in sorted({*OTHER_WEIGHTS} & set(_set_in(config))):
        yield f"may take its weights from another file, by {key} in its {CONFIG_FILE}", _ANEW
    model_type = str(config.get("model_type"))
    classes = config.get("architectures")
    named = [flavor.get("pipeline_model_type"), *(classes if isinstance(classes, list) else ())]
    others = [name for name in named if not _is_for(name, model_type)]
    if others:
        yield (
            f"would be loaded as {_brief(others[0])}, and its {CONFIG_FILE} says that it is a "
            f"{model_type!r}, of which transformers has other classes",
            _ANEW,
        )
    if config.get("text_config") is not None and not _has_text_config(model_type):
        yield (
            f"has a text_config in its {CONFIG_FILE}, which models of type {model_type!r} do not look at",
            _ANEW,
        )


def _options(reader: ArtifactReader, described: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Where options are that a model is asked with though nobody names them, and what they are."""
    yield "its MLmodel file (config)", described["flavors"].get("python_function", {}).get("config")
    signature = described.get("signature")
    declared = signature.get("params") if isinstance(signature, Mapping) else None
    try:
        params = json.loads(declared) if isinstance(declared, str) else declared
    except (ValueError, RecursionError) as error:
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
        yield OPTIONS_FILE, read_json(reader, OPTIONS_FILE)


def _set_in(options: Any) -> Iterator[str]:
    """The names of options that are set, also of those within others.

    Each container is looked at once: an MLmodel file can have one in many places, and in itself.
    """
    seen: set[int] = set()
    left = [options]
    while left:
        values = left.pop()
        if id(values) in seen or not isinstance(values, Mapping | list | tuple):
            continue
        seen.add(id(values))
        if isinstance(values, Mapping):
            yield from (str(name) for name, value in values.items() if value)
            left.extend(values.values())
        else:
            left.extend(values)


def _classes(flavor: Mapping[str, Any], components: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The classes that MLflow loads a model and what belongs to it with, by their keys."""
    keys = ("pipeline_model_type", *(f"{name}_type" for name in components))
    yield from ((key, flavor.get(key)) for key in keys)
    if "processor_type" in flavor:
        yield "processor_type", flavor["processor_type"]


def _is_renamed(reader: ArtifactReader, key: str, name: Any) -> bool:
    """Whether it is a tokenizer that has another name by now, and no code beside it."""
    paths = {file.path for file in reader.files()}
    folder = f"components/{key.removesuffix('_type')}"
    files = [path for path in (f"{folder}/tokenizer_config.json", f"{folder}/{CONFIG_FILE}") if path in paths]
    return (
        name in RENAMED_TOKENIZERS
        and bool(files)
        and all("auto_map" not in read_json(reader, path) for path in files)
    )


def _is_of_transformers(name: Any) -> bool:
    """Whether MLflow would find a class there; asking for one loads its module, so most are looked up."""
    import transformers

    return isinstance(name, str) and (name in _names() or hasattr(transformers, name))


def _is_for(name: Any, model_type: str) -> bool:
    """Whether a class is one of those that transformers has for a type of model, or chooses one of them.

    Of a type that it does not know nothing is told here: where its heads are is not known either.
    """
    if not isinstance(name, str):
        return False
    known = _classes_for(model_type)
    return name.startswith("Auto") or name in known or not known or _type_of(name) == model_type


def _type_of(name: str) -> Any:
    """The type of model that a class of transformers is for; its tables lack some classes."""
    import transformers

    try:
        found = getattr(transformers, name, None)
    except ImportError:  # it needs a package that is not here
        return None
    return getattr(getattr(found, "config_class", None), "model_type", None)


@cache
def _has_text_config(model_type: str) -> bool:
    """Whether models of a type have another one in them that writes; of an unknown type that may be."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type not in CONFIG_MAPPING or "text_config" in CONFIG_MAPPING[model_type].sub_configs


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
