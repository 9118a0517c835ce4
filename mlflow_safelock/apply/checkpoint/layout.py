"""Where the files of a fine-tune are: in one Hugging Face folder, or spread over an MLflow model's folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlflow_safelock.errors import CheckpointError

BIAS_FILE = "model-safelock.safetensors"
"""The file with every tensor that a lock adds."""

RECORD_FILE = "safelock.json"
"""The file that says what was locked, and how to undo it."""

MERGE_FIRST = "Merge the adapter before saving: model.merge_and_unload()."

_CARRIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md", ".tiktoken")
_CARRIED_STEMS = ("LICENSE", "NOTICE")
# Written anew, or the state of a training run.
_NOT_CARRIED = (
    "README.md",
    "config.json",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    RECORD_FILE,
)
_TEMPLATES = "additional_chat_templates"
_WEIGHTS_SUFFIXES = (".safetensors", ".index.json")
_INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Layout:
    """The files of a fine-tune.

    Attributes:
        model: Folder with ``config.json`` and the weights.
        tokenizer: Folder with the tokenizer; ``None`` where there is none.
        tokenizer_class: ``transformers`` class that the tokenizer is loaded with, where that is recorded.
        carried: Files that a locked checkpoint carries as they are, by their path in it: tokenizer, chat
            templates, generation settings, licence.
        left_out: Names of the files in ``model`` that it does not carry, and of folders, with a slash at the
            end, of which it does not carry all.
        card: The model card; empty where there is none.
    """

    model: Path
    tokenizer: Path | None
    tokenizer_class: str | None
    carried: Mapping[str, Path]
    left_out: tuple[str, ...]
    card: str


def layout_of(folder: Path) -> Layout:
    """Find the files of a fine-tune.

    Args:
        folder: A folder that ``save_pretrained`` wrote, or a model folder of ``mlflow.transformers``.

    Raises:
        CheckpointError: It is neither, or holds an adapter or no weights.
    """
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}.", next_step="Check the path of the fine-tune.")
    if (folder / "MLmodel").is_file():
        return _mlflow_layout(folder)
    return _hugging_face_layout(folder)


def _hugging_face_layout(folder: Path) -> Layout:
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds a PEFT adapter (adapter_config.json), not a whole model.", next_step=MERGE_FIRST
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json, so it is not a Hugging Face checkpoint.",
            next_step="Save the fine-tune with save_pretrained.",
        )
    files = {path.name for path in folder.iterdir() if path.is_file()}
    carried = _by_name(path for path in sorted(folder.iterdir()) if _is_carried(path))
    carried |= _in(_TEMPLATES, sorted((folder / _TEMPLATES).glob("*.jinja")))
    weights = {name for name in files if name.endswith(".safetensors")}
    left_out = files - weights - set(carried) - {"config.json", "README.md", _INDEX_FILE}
    left_out |= _folders_left_out(folder, carried)
    return Layout(
        model=folder,
        tokenizer=folder if (folder / "tokenizer_config.json").is_file() else None,
        tokenizer_class=None,
        carried=carried,
        left_out=tuple(sorted(left_out)),
        card=_text(folder / "README.md"),
    )


def _mlflow_layout(folder: Path) -> Layout:
    flavor = _transformers_flavor(folder)
    if "peft_adaptor" in flavor:
        raise CheckpointError(
            f"{folder} holds a PEFT model as mlflow.transformers logs it, and transformers 5 loads that with "
            "random weights in place of the adapted ones.",
            next_step=f"{MERGE_FIRST} Then log it again.",
        )
    if not isinstance(flavor.get("model_binary"), str):
        raise CheckpointError(
            f"{folder} holds no weights, only a reference to {flavor.get('source_model_name')!r}.",
            next_step="Store the weights first: mlflow.transformers.persist_pretrained_model(model_uri).",
        )
    model = _hugging_face_layout(_folder_inside(folder, flavor["model_binary"]))
    components, tokenizer_class = flavor.get("components") or (), flavor.get("tokenizer_type")
    if not isinstance(components, list | tuple) or not all(isinstance(name, str) for name in components):
        raise CheckpointError(
            f"{folder / 'MLmodel'} names the components {components!r}, which is no list of names.",
            next_step="Log the fine-tune with mlflow.transformers.log_model.",
        )
    folders = [_folder_inside(folder, f"components/{name}") for name in components]
    apart = [path for place in folders for path in sorted(place.iterdir()) if _is_carried(path)]
    templates = [path for place in folders for path in sorted((place / _TEMPLATES).glob("*.jinja"))]
    licence = (path for path in (folder / "LICENSE.txt",) if path.is_file())
    return Layout(
        model=model.model,
        tokenizer=folder / "components" / "tokenizer" if "tokenizer" in components else model.tokenizer,
        tokenizer_class=str(tokenizer_class) if tokenizer_class and "tokenizer" in components else None,
        carried={**_by_name(licence), **model.carried, **_by_name(apart), **_in(_TEMPLATES, templates)},
        left_out=model.left_out,
        card=model.card or _mlflow_card(folder),
    )


def _transformers_flavor(folder: Path) -> dict[str, Any]:
    try:
        described = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder / 'MLmodel'} cannot be read: {error}.") from error
    flavors = described.get("flavors") if isinstance(described, dict) else None
    flavor = flavors.get("transformers") if isinstance(flavors, dict) else None
    if not isinstance(flavor, dict):
        raise CheckpointError(
            f"{folder} is an MLflow model, but not one of mlflow.transformers.",
            next_step="Log the fine-tune with mlflow.transformers.log_model.",
        )
    return flavor


def _folder_inside(folder: Path, name: str) -> Path:
    # What an MLmodel file says is not trusted: it must not lead us elsewhere.
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_dir():
        raise CheckpointError(f"{folder / 'MLmodel'} names {name!r}, and {folder} has no such folder.")
    return path


def _mlflow_card(folder: Path) -> str:
    """The card of a Hugging Face model, which MLflow stores as text and data apart."""
    text, data = _text(folder / "model_card.md"), _text(folder / "model_card_data.yaml")
    return f"---\n{data.strip()}\n---\n{text}" if data.strip() else text


def checked_name(name: str) -> str:
    """A file's name, where every system can have a file of that name.

    Raises:
        CheckpointError: It is not UTF-8, or has a backslash, as in an archive of Windows.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        is_plain = False
    else:
        is_plain = "\\" not in name
    if not is_plain:
        raise CheckpointError(
            f"A locked checkpoint can hold no file of the name {name!r}: not UTF-8, or with a backslash.",
            next_step="Rename the file, or take it out of the fine-tune's folder.",
        )
    return name


def is_carried_name(name: str) -> bool:
    """Whether a locked checkpoint carries a file of this name as it is."""
    if name in _NOT_CARRIED or name.endswith(_WEIGHTS_SUFFIXES):
        return False
    return name.endswith(_CARRIED_SUFFIXES) or name.upper().startswith(_CARRIED_STEMS)


def _is_carried(path: Path) -> bool:
    return path.is_file() and is_carried_name(path.name)


def _folders_left_out(folder: Path, carried: Mapping[str, Path]) -> set[str]:
    """Folders of which something is not carried, with a slash at the end."""
    kept = {path.resolve() for path in carried.values()}
    return {
        f"{inner.name}/"
        for inner in folder.iterdir()
        if inner.is_dir() and any(path.is_file() and path.resolve() not in kept for path in inner.rglob("*"))
    }


def _by_name(paths: Iterable[Path]) -> dict[str, Path]:
    return {checked_name(path.name): path for path in paths}


def _in(folder: str, paths: Iterable[Path]) -> dict[str, Path]:
    return {f"{folder}/{checked_name(path.name)}": path for path in paths}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
