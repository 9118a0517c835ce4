"""References to models and locks: local folders, hub ids and MLflow URIs, opened in one place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_safelock.errors import LockFormatError, PromotionRefused, SourceError

if TYPE_CHECKING:
    from mlflow_safelock.gate.source import LanguageModel as Examined
    from mlflow_safelock.lock import AttentionGeometry, SafetyLock
    from mlflow_safelock.provenance import LocalArtifacts

MLFLOW_SCHEMES = ("models:/", "runs:/", "mlflow-artifacts:/", "s3://", "gs://", "abfss://", "wasbs://")
"""Beginnings of references that MLflow opens; anything else is a local path or a hub id."""


@dataclass(frozen=True)
class ModelLoading:
    """How a model is loaded.

    Attributes:
        dtype: ``auto`` for the checkpoint's number format, or the name of a torch dtype.
        device: ``auto`` for a GPU where there is one, or the name of a torch device.
        device_map: How accelerate spreads it over GPUs, main memory and disk; ``None`` for one device.
        offload_folder: Folder for what goes to disk and cannot be read from the checkpoint itself.
    """

    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    offload_folder: Path | None = None


@dataclass(frozen=True)
class LanguageModel:
    """A loaded language model.

    Attributes:
        model: A ``transformers`` model in evaluation mode.
        tokenizer: Its tokenizer.
        identity: What it is known as: its hub id, or what it says that it was made from; ``None`` where it
            does not say.
    """

    model: Any
    tokenizer: Any
    identity: str | None


ONE_DEVICE = ModelLoading()


def load_language_model(reference: str, loading: ModelLoading = ONE_DEVICE) -> LanguageModel:
    """Load a causal language model and its tokenizer; no code that comes with a model is run.

    Args:
        reference: A local checkpoint folder, a hub id, or an MLflow model of ``mlflow.transformers`` (a URI
            or a folder).
        loading: Number format, and where the weights go.

    Raises:
        SourceError: There is no such model, it cannot be loaded, or a device map is asked for and accelerate
            is not installed.
        PromotionRefused: It is an MLflow model in a form that would load with other weights than its own.
    """
    import torch

    where = _device(loading.device)
    if loading.device_map is not None:
        _require_accelerate()
    if is_mlflow_model(reference):
        loaded = _load_from_mlflow(reference, loading)
    else:
        loaded = _load_with_transformers(reference, loading)
    loaded.model.eval()
    if loading.device_map is not None:
        return loaded
    try:
        loaded.model.to(where)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        raise SourceError(
            f"The model cannot be moved to {where}: {_first_line(error)}.",
            next_step="Try --device-map auto, which spreads it, or --device cpu.",
        ) from error
    return loaded


def geometry_of(reference: str) -> AttentionGeometry:
    """The attention shape of a model, from its configuration alone.

    Raises:
        SourceError: There is no such model, it has no readable configuration, or it is locked.
        UnsupportedArchitectureError: Its architecture is not known.
    """
    from mlflow_safelock.apply import geometry_from_config

    if not is_mlflow_model(reference):
        return geometry_from_config(_config(reference))
    found = _examined(reference, fetch_mlflow_model(reference))
    if found.geometry is None:
        raise SourceError(
            f"{reference} is an adapter, which says nothing of its base's attention shape.",
            next_step=f"Name the base itself: {found.said_bases[0]}.",
        )
    return found.geometry


def load_lock_reference(reference: str) -> SafetyLock:
    """Read a lock from a lock file, or from MLflow.

    Raises:
        LockError: There is no such file, or it is not a sound lock.
        mlflow.exceptions.MlflowException: There is no such logged lock.
    """
    if is_mlflow_model(reference):
        from mlflow_safelock.flavors import meta_safetylock

        return meta_safetylock.load_model(reference)
    from mlflow_safelock.formats import load_lock

    try:
        return load_lock(reference)
    except LockFormatError as error:
        if not _is_pickle_archive(Path(reference)):
            raise
        raise LockFormatError(
            f"{reference} is no lock file of this package; it looks like one that torch.save wrote.",
            next_step="If it is a lock that the method's authors published: safelock lock import "
            f"{reference} --base-model … --output lock.safetensors",
        ) from error


def is_mlflow_model(reference: str) -> bool:
    """Whether MLflow is what opens a reference: a URI of its own, or a folder with an MLmodel file."""
    return reference.startswith(MLFLOW_SCHEMES) or (Path(reference) / "MLmodel").is_file()


def fetch_mlflow_model(reference: str) -> Path:
    """The local folder of an MLflow model, downloaded where it is not local already.

    Raises:
        SourceError: There is no such model, or it cannot be fetched.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking.artifact_utils import _download_artifact_from_uri

    try:
        return Path(_download_artifact_from_uri(reference))
    except (MlflowException, OSError) as error:
        raise SourceError(
            f"The model {reference} cannot be fetched: {getattr(error, 'message', error)}",
            next_step="Check the name and version, and --tracking-uri and --registry-uri.",
        ) from error


def _load_from_mlflow(reference: str, loading: ModelLoading) -> LanguageModel:
    import mlflow

    from mlflow_safelock.flavors.overlay import read_mlmodel
    from mlflow_safelock.provenance import LocalArtifacts

    folder = fetch_mlflow_model(reference)
    found = _examined(reference, folder)
    described = read_mlmodel(LocalArtifacts(folder))
    if loading.offload_folder is not None:
        raise SourceError(
            f"MLflow loads {reference}, and takes no folder to offload weights to.",
            next_step="Leave --offload-folder out: what stays on disk is read from the model's own files.",
        )
    dtype = {} if loading.dtype == "auto" else {"dtype": loading.dtype}
    try:
        with _mlflow_device_map(loading.device_map):
            # Its public function would first put code that was logged with the model on the path.
            components: Mapping[str, Any] = mlflow.transformers._load_model(
                str(folder), described["flavors"]["transformers"], "components", **dtype
            )
    except Exception as error:  # what loading raises depends on the architecture
        raise SourceError(f"The model {reference} cannot be loaded: {_first_line(error)}.") from error
    model, tokenizer = components.get("model"), components.get("tokenizer")
    if model is None or tokenizer is None:
        raise SourceError(
            f"The model {reference} was logged without a tokenizer.",
            next_step="Log model and tokenizer together with mlflow.transformers.log_model.",
        )
    if loading.device_map is not None and not hasattr(model, "hf_device_map"):
        raise SourceError(
            f"MLflow could not load {reference} with a device map.",
            next_step="Leave --device-map out, or name a checkpoint folder.",
        )
    said = (base for base in found.said_bases if not Path(base).is_absolute())
    return LanguageModel(model, tokenizer, next(said, None))


@contextmanager
def _mlflow_device_map(strategy: str | None) -> Iterator[None]:
    """Have MLflow load with a device map, or without; it is told by variables of the environment."""
    told = {"MLFLOW_HUGGINGFACE_USE_DEVICE_MAP": str(strategy is not None).lower()}
    if strategy is not None:
        told["MLFLOW_HUGGINGFACE_DEVICE_MAP_STRATEGY"] = strategy
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _load_with_transformers(reference: str, loading: ModelLoading) -> LanguageModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = _config(reference)
    try:
        # Safetensors only: a pickle could run anything.
        model = AutoModelForCausalLM.from_pretrained(
            reference,
            config=config,
            dtype=loading.dtype,
            device_map=loading.device_map,
            offload_folder=loading.offload_folder,
            use_safetensors=True,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
    except Exception as error:  # what loading raises depends on the architecture
        raise SourceError(
            f"The model {reference} cannot be loaded: {_first_line(error)}.",
            next_step="It must be a folder with config.json, safetensors weights and a tokenizer.",
        ) from error
    return LanguageModel(model, tokenizer, None if Path(reference).is_dir() else reference)


def _config(reference: str) -> Any:
    from transformers import AutoConfig

    if not Path(reference).is_dir() and _looks_like_a_path(reference):
        raise SourceError(
            f"There is no model folder at {reference}.",
            next_step="Give a local folder, a hub id such as org/name, or an MLflow URI: models:/name/1.",
        )
    try:
        return AutoConfig.from_pretrained(reference, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"The model {reference} has no configuration that can be read: {_first_line(error)}.",
            next_step="Check the name; a hub id needs the model in the local cache, or the network and "
            "HF_HUB_OFFLINE unset.",
        ) from error


def _examined(reference: str, folder: Path) -> Examined:
    """What a model of MLflow is: an unlocked language model."""
    from mlflow_safelock.flavors.overlay import read_mlmodel
    from mlflow_safelock.flavors.stock_loading import refuse_folder_for_base
    from mlflow_safelock.gate.source import examine
    from mlflow_safelock.provenance import LocalArtifacts

    source = LocalArtifacts(folder)
    _refuse_locked(reference, source)
    try:
        found = examine(source)
    except PromotionRefused as refusal:
        if refusal.reason != "already_locked":
            raise
        raise _locked(reference, "") from refusal
    if found is None:
        raise SourceError(
            f"The model {reference} is no language model of mlflow.transformers.",
            next_step="Log it with mlflow.transformers.log_model, with task='text-generation'.",
        )
    if found.adapter is not None:
        refuse_folder_for_base(read_mlmodel(source))
    return found


def _refuse_locked(reference: str, source: LocalArtifacts) -> None:
    from mlflow_safelock.flavors.overlay import FLAVOR_NAME, RECEIPT_FILE, read_mlmodel
    from mlflow_safelock.provenance import Receipt

    if FLAVOR_NAME in read_mlmodel(source)["flavors"]:
        # The receipt of either carrier; it only says where to look, so nothing else is compared with it.
        receipt = Receipt.parse(source.read(RECEIPT_FILE), origin=f"{reference}/{RECEIPT_FILE}")
        raise _locked(reference, f": {receipt.predicate.source.uri}")


def _locked(reference: str, behind: str) -> SourceError:
    return SourceError(
        f"The model {reference} is locked already.",
        next_step=f"Name the fine-tune that it was made from{behind or '.'}",
    )


def _require_accelerate() -> None:
    if find_spec("accelerate") is None:
        raise SourceError(
            "A model is spread over devices by accelerate, which is not installed.",
            next_step="Install it: pip install 'mlflow-safelock[large]'",
        )


def _device(name: str) -> Any:
    import torch

    try:
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise SourceError(f"There is no device {name!r}.", next_step="Try --device cpu.") from error


def _looks_like_a_path(reference: str) -> bool:
    return reference.startswith((".", "/", "~")) or reference.count("/") > 1 or "\\" in reference


def _is_pickle_archive(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(2) in (b"PK", b"\x80\x02")
    except OSError:
        return False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
