"""The weights of a model that was logged as a reference to a hub, written into its folder.

MLflow's own function for it loads the model first, by whatever classes and code its MLmodel file names, which
anybody may have written. Here files are fetched by their names and copied, and nothing of them is run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.transformers.flavor_config import update_flavor_conf_to_persist_pretrained_model

from mlflow_safelock.errors import SourceError
from mlflow_safelock.gate.source import HubReference, is_hub_reference

MODEL_FOLDER = "model"
"""Where MLflow has the weights of a model of its transformers flavor."""

WEIGHTS = (
    *("config.json", "generation_config.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
)
TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "chat_template.*"),
)
"""Names of the files that are fetched; code is not among them, nor anything pickled, nor the same weights in
another layout, such as Mistral's ``consolidated.safetensors``."""

_ADAPTER = "adapter_config.json"
"""What has transformers put an adapter on the weights beside it."""

_NESTED = "*/*"

_NEXT = "Log it with its weights: mlflow.transformers.log_model(..., save_pretrained=True)."


def write_weights(mlmodel: bytes, reference: HubReference, folder: Path) -> None:
    """Write what a model that refers to a hub lacks: its weights, its tokenizer, and the MLmodel file.

    Args:
        mlmodel: Its MLmodel file as it is.
        reference: What it refers to.
        folder: An empty folder for it, laid out as MLflow does.

    Raises:
        SourceError: The repository has no such files, or an adapter beside them, or the model has further
            parts.
        huggingface_hub.errors.HfHubHTTPError: The hub does not have it, or not for this process.
        OSError: The hub is not reached, or the folder not written.
    """
    description = Model.from_dict(yaml.safe_load(mlmodel))
    flavor = description.flavors["transformers"]
    parts = list(flavor.get("components") or [])
    if set(parts) - {"tokenizer"} or "processor_type" in flavor:
        raise SourceError(
            f"The model has parts beside a tokenizer ({', '.join(map(str, parts)) or 'a processor'}), which "
            "are not fetched.",
            next_step=_NEXT,
        )
    _fetch(reference, (*WEIGHTS, _ADAPTER), folder / MODEL_FOLDER)
    if (folder / MODEL_FOLDER / _ADAPTER).exists():
        raise SourceError(
            f"Beside its weights {reference} holds an adapter, which transformers puts on them.",
            next_step="Merge it (model.merge_and_unload()), and log that.",
        )
    if not list((folder / MODEL_FOLDER).glob("*.safetensors")):
        raise SourceError(f"There are no safetensors weights in {reference}.", next_step=_NEXT)
    for part in parts:
        of_part = _reference_of(part, flavor) or reference
        _fetch(of_part, TOKENIZER, folder / "components" / part)
    description.add_flavor("transformers", **update_flavor_conf_to_persist_pretrained_model(flavor))
    description.save(str(folder / MLMODEL_FILE_NAME))


def _reference_of(part: str, flavor: dict[str, Any]) -> HubReference | None:
    """The repository that a part of a pipeline comes from, where that is named and at a commit."""
    repository, commit = flavor.get(f"{part}_name"), str(flavor.get(f"{part}_revision"))
    if repository is None:
        return None
    if not is_hub_reference(repository, commit):
        raise SourceError(
            f"The model's {part} comes from {repository!r}, which is no repository of a hub at a commit.",
            next_step=_NEXT,
        )
    return HubReference(str(repository), commit)


def _fetch(reference: HubReference, names: tuple[str, ...], folder: Path) -> None:
    """Copy files of a repository at a commit, from the hub or its cache on this machine."""
    fetched = Path(
        snapshot_download(
            reference.repository,
            revision=reference.commit,
            allow_patterns=list(names),
            ignore_patterns=_NESTED,  # a name's asterisk stands for a slash, too
        )
    )
    folder.mkdir(parents=True)
    for name in names:
        for file in fetched.glob(name):
            # What a cache has are links to what is stored by its digest.
            shutil.copyfile(file.resolve(), folder / file.name)
