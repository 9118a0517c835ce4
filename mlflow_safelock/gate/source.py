"""What is being promoted: a language model that a lock goes onto, something else, or a way around."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mlflow_safelock.apply.adapters import MERGE, why_untold
from mlflow_safelock.apply.architectures import Architecture, architecture_of, geometry_from_config
from mlflow_safelock.errors import (
    PromotionRefused,
    SourceError,
    UnreachableError,
    UnsupportedArchitectureError,
)
from mlflow_safelock.flavors import overlay
from mlflow_safelock.flavors.stock_loading import check_stock_code, check_stock_loading, read_config
from mlflow_safelock.flavors.stored_json import read_json
from mlflow_safelock.gate.adapter import Adapter, read_adapter
from mlflow_safelock.gate.stored_tokenizer import StoredTokenizer, find_tokenizer
from mlflow_safelock.gate.stored_weights import StoredWeights, read_stored_weights
from mlflow_safelock.lock import AttentionGeometry
from mlflow_safelock.provenance import ArtifactReader
from mlflow_safelock.provenance.contents import BEGINNING_BYTES

DECODER_CLASSES = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel", "WithLMHead")
"""Ends of the class names of models that do nothing but write text."""

LANGUAGE_MODEL_CLASSES = (
    *DECODER_CLASSES,
    *("ForConditionalGeneration", "ForImageTextToText", "ForMultimodalLM"),
    *("ForVisionText2Text", "ForProteinText2Text", "_Omni_Reasoning_V3"),
)
"""Ends of the class names of models that write text."""

LANGUAGE_MODEL_TASKS = ("text-generation", "conversational", "llm/v1/")
"""Beginnings of the tasks that such models are logged with."""

PICKLES = (".pkl", ".pickle", ".pth", ".pt", ".bin", ".ckpt", ".joblib")
"""Ends of the names of files that hold pickled objects."""

PICKLE_BYTES = BEGINNING_BYTES
"""How much of such a file's beginning is searched; the names of its classes stand before its numbers."""

_PICKLED_LANGUAGE_MODEL = re.compile(rb"transformers[\w.]*[^\w]{1,4}[A-Z]\w*(ForCausalLM|LMHeadModel)")
"""The module and the class of a pickled language model, as every protocol of pickle writes them."""

_COMMIT = re.compile("[0-9a-f]{40}")
_REPOSITORY = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")

PROMPT_SOURCE = "dummy-source"
"""What MLflow registers as the source of a prompt, which has no artifacts."""

PROMPT_TAG = "mlflow.prompt.is_prompt"

MERGE_FIRST = (
    "Merge the adapter before logging: model.merge_and_unload(), then mlflow.transformers.log_model."
)


@dataclass(frozen=True)
class BaseHint:
    """What somebody says that a fine-tune was made from; checked, and never believed.

    Attributes:
        base: The base model.
        said_by: Where it says so, in words.
    """

    base: str
    said_by: str


@dataclass(frozen=True)
class LanguageModel:
    """A fine-tune that a lock goes onto.

    Attributes:
        geometry: Its attention shape; ``None`` for an adapter alone, whose shape is that of its base. What
            the adapter tells of that is compared, and the loader checks it before anything is served.
        hints: What the model itself says that it was made from, most telling first.
        architecture: Where its heads are; ``None`` for an adapter alone.
        weights: Its weights; ``None`` for an adapter alone.
        adapter: What an adapter alone tells of its base; ``None`` for others.
        tokenizer: Its tokenizer; ``None`` where it was logged without one, as adapters are.
    """

    geometry: AttentionGeometry | None
    hints: tuple[BaseHint, ...]
    architecture: Architecture | None = None
    weights: StoredWeights | None = None
    adapter: Adapter | None = None
    tokenizer: StoredTokenizer | None = None

    @property
    def said_bases(self) -> tuple[str, ...]:
        """The bases that it names, most telling first."""
        return tuple(hint.base for hint in self.hints)


def examine(reader: ArtifactReader) -> LanguageModel | None:
    """Tell what the artifacts of a model version are.

    Returns:
        The language model, or ``None`` for a model of another kind.

    Raises:
        PromotionRefused: A language model in a form that cannot be locked; the reason says which.
        SourceError: The artifacts cannot be read.
    """
    paths = {file.path for file in reader.files()}
    described = overlay.read_mlmodel(reader) if "MLmodel" in paths else {"flavors": {}}
    flavors = described["flavors"]
    if overlay.FLAVOR_NAME in flavors:
        raise PromotionRefused(
            "already_locked",
            f"The artifacts at {reader.location} are a locked model already, and it is not in this ledger.",
            next_step="Register the fine-tune that it was made from, and promote that one.",
        )
    transformers = flavors.get("transformers")
    if not isinstance(transformers, dict):
        _refuse_a_disguised_language_model(reader, paths)
        return None
    if not _writes_text(transformers):
        _refuse_a_disguised_language_model(reader, paths)
        return None
    loader = overlay.foreign_loader(flavors)
    if loader is not None:
        raise PromotionRefused(
            "unsupported_flavor",
            f"The model's pyfunc flavor is loaded by {loader!r}, which may serve anything, and not by "
            "MLflow's own loader of transformers models.",
            next_step="Log it with mlflow.transformers.log_model.",
        )
    return _language_model(reader, paths, described)


@dataclass(frozen=True)
class HubReference:
    """A model on a hub: its repository, and the commit there, 40 hexadecimal digits."""

    repository: str
    commit: str

    def __str__(self) -> str:
        return f"{self.repository!r} at commit {self.commit}"


def hub_reference(reader: ArtifactReader) -> HubReference | None:
    """What a language model without weights was logged as a reference to; ``None`` for any other model.

    Raises:
        PromotionRefused: It would be loaded by code of its own.
        SourceError: The artifacts cannot be read.
    """
    if "MLmodel" not in {file.path for file in reader.files()}:
        return None
    described = overlay.read_mlmodel(reader)
    flavors = described["flavors"]
    flavor = flavors.get("transformers")
    if not isinstance(flavor, dict) or not _writes_text(flavor) or overlay.foreign_loader(flavors):
        return None
    if flavor.get("model_binary") is not None or flavor.get("peft_adaptor"):
        return None
    repository, commit = flavor.get("source_model_name"), str(flavor.get("source_model_revision"))
    if not is_hub_reference(repository, commit):
        return None
    _refuse_loaded_otherwise(check_stock_code, reader, described)
    return HubReference(str(repository), commit)


def is_hub_reference(repository: object, commit: str) -> bool:
    """Whether it is a repository by its name, and its owner if it has one, and no path; and a commit."""
    return (
        isinstance(repository, str)
        and _REPOSITORY.fullmatch(repository) is not None
        and _COMMIT.fullmatch(commit) is not None
    )


def _language_model(reader: ArtifactReader, paths: set[str], described: Mapping[str, Any]) -> LanguageModel:
    flavor = described["flavors"]["transformers"]
    binary = flavor.get("model_binary")
    if flavor.get("peft_adaptor"):
        if binary is not None:
            raise PromotionRefused(
                "unmerged_adapter",
                "The model was logged as a PEFT adapter together with its base's weights, a form that "
                "transformers 5 reloads with random weights in place of the adapted ones.",
                next_step=MERGE_FIRST,
            )
        return _adapter(reader, paths, described)
    weights = read_stored_weights(reader, binary) if isinstance(binary, str) else None
    if weights is None or f"{binary}/config.json" not in paths:
        raise PromotionRefused(
            "no_weights",
            "The model was logged without safetensors weights, so there is nothing for a lock to go onto.",
            next_step="Log it with its weights: mlflow.transformers.log_model(..., save_pretrained=True).",
        )
    config = read_config(reader, described)
    _refuse_loaded_otherwise(check_stock_loading, reader, described, config)
    if "safelock" in config:
        raise PromotionRefused(
            "already_locked",
            "The model's weights carry a lock already (its config.json says so).",
            next_step="Register the fine-tune that it was made from, and promote that one.",
        )
    if any(".base_layer." in name for name in weights.tensors):
        raise PromotionRefused(
            "unmerged_adapter",
            "The weights are those of an unmerged PEFT model (names with '.base_layer.'), which transformers "
            "reloads with random weights in their place.",
            next_step=MERGE_FIRST,
        )
    try:
        architecture, geometry = architecture_of(config), geometry_from_config(config)
    except UnsupportedArchitectureError as error:
        raise PromotionRefused("unsupported_architecture", error.cause, next_step=error.next_step) from error
    weights.check_output_projections(architecture, geometry)
    hints = _hints(
        {
            "source_model_name in MLmodel": flavor.get("source_model_name"),
            "_name_or_path in config.json": config.get("_name_or_path"),
        }
    )
    tokenizer = find_tokenizer(reader, str(binary))
    return LanguageModel(geometry, hints, architecture, weights, tokenizer=tokenizer)


def _adapter(reader: ArtifactReader, paths: set[str], described: Mapping[str, Any]) -> LanguageModel:
    """A PEFT adapter that names its base: a repository on a hub, at one commit."""
    flavor = described["flavors"]["transformers"]
    folder = flavor["peft_adaptor"]
    base, commit = flavor.get("source_model_name"), str(flavor.get("source_model_revision"))
    if not is_hub_reference(base, commit) or "local_base_model_path" in flavor:
        raise PromotionRefused(
            "base_not_pinned",
            "The model was logged as a PEFT adapter whose base is not named by a repository of a hub and a "
            "commit, so its weights could change after the promotion.",
            next_step="Log it over a base that was loaded from a hub by its name, or merge it: "
            + MERGE_FIRST,
        )
    _refuse_loaded_otherwise(check_stock_code, reader, described)
    config_path = f"{folder}/adapter_config.json"
    if config_path not in paths or f"{folder}/adapter_model.safetensors" not in paths:
        raise PromotionRefused(
            "no_weights",
            f"The adapter's configuration or its safetensors weights are missing in {folder!r}.",
            next_step="Log it again: mlflow.transformers.log_model saves both, of an adapter that is named "
            "'default', as PeftModel.from_pretrained(base, folder) names it.",
        )
    config = read_json(reader, config_path)
    said = {
        "base_model_name_or_path in adapter_config.json": config.get("base_model_name_or_path"),
        "source_model_name in MLmodel": base,
    }
    why = why_untold(config)
    if why is not None:
        raise PromotionRefused(
            "lock_taken_back",
            f"The adapter {why}, so that it cannot be told whether it takes a lock back.",
            next_step=MERGE,
        )
    adapter = read_adapter(reader, f"{folder}/adapter_model.safetensors", config)
    return LanguageModel(None, _hints(said), adapter=adapter)


def _refuse_loaded_otherwise(check: Callable[..., None], *what: Any) -> None:
    try:
        check(*what)
    except UnreachableError:
        raise
    except SourceError as error:
        raise PromotionRefused("loaded_otherwise", error.cause, next_step=error.next_step) from error


def _hints(said: Mapping[str, Any]) -> tuple[BaseHint, ...]:
    """Each base once, by who says it first."""
    found: dict[str, BaseHint] = {}
    for said_by, base in said.items():
        if isinstance(base, str) and base:
            found.setdefault(base, BaseHint(base, said_by))
    return tuple(found.values())


def _writes_text(flavor: Mapping[str, Any]) -> bool:
    task, kind = str(flavor.get("task", "")), str(flavor.get("pipeline_model_type", ""))
    return task.startswith(LANGUAGE_MODEL_TASKS) or kind.endswith(LANGUAGE_MODEL_CLASSES)


def _refuse_a_disguised_language_model(reader: ArtifactReader, paths: set[str]) -> None:
    """A language model in another flavor would be served unlocked, so it does not pass as something else."""
    sizes = {file.path: file.size for file in reader.files()}
    for path in sorted(paths):
        if PurePosixPath(path).name == "config.json":
            found = _describes_a_language_model(read_json(reader, path))
        elif path.endswith(PICKLES):
            beginning = reader.read(path, 0, min(sizes[path], PICKLE_BYTES))
            found = _PICKLED_LANGUAGE_MODEL.search(beginning) is not None
        else:
            found = path.endswith(".gguf")
        if found:
            raise PromotionRefused(
                "unsupported_flavor",
                f"There is a language model in {path!r}, logged in a flavor that a lock cannot go onto.",
                next_step="Log it with mlflow.transformers.log_model.",
            )


def _describes_a_language_model(config: Mapping[str, Any]) -> bool:
    classes = config.get("architectures")
    names = [str(name) for name in classes] if isinstance(classes, list) else []
    if any(name.endswith(DECODER_CLASSES) for name in names):
        return True
    # A model that sees and writes has its decoder's configuration inside; one that transcribes has none.
    return "text_config" in config and any(name.endswith(LANGUAGE_MODEL_CLASSES) for name in names)
