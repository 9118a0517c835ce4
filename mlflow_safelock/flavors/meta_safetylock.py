"""MLflow flavor of a lock: one registered model per base model, one version per lock.

Example:
    >>> import mlflow_safelock.flavors.meta_safetylock as meta_safetylock
    >>> info = meta_safetylock.log_model(lock, registered_model_name=lock_model_name(lock.base_model))
    >>> meta_safetylock.load_model("models:/safelock.meta-llama--Meta-Llama-3-8B-Instruct/1")
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME, ModelInfo
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.tracking.artifact_utils import _download_artifact_from_uri
from mlflow.utils.model_utils import (
    _get_flavor_configuration,
    _validate_and_copy_code_paths,
    _validate_and_prepare_target_save_path,
)

from mlflow_safelock.errors import LockFormatError
from mlflow_safelock.flavors.environment import (
    default_conda_env,
    default_pip_requirements,
    write_environment,
)
from mlflow_safelock.flavors.plots import head_map
from mlflow_safelock.formats import load_lock, save_lock
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import LOCK_SIGNATURE_FILE

FLAVOR_NAME = "safelock"
LOCK_FILE = "lock.safetensors"
PLOT_FILE = "head_scores.png"
MODEL_TYPE = "meta-safetylock"


LOCK_MODEL_PREFIX = "safelock."
"""What the names of registered models begin with that hold locks."""


def lock_model_name(base_model: str) -> str:
    """Name of the registered model that holds the locks of a base model.

    A registered model's name may hold neither slash nor colon, so both become ``--``:
    ``meta-llama/Meta-Llama-3-8B`` gives ``safelock.meta-llama--Meta-Llama-3-8B``.
    """
    return LOCK_MODEL_PREFIX + base_model.replace("/", "--").replace(":", "--")


def get_default_pip_requirements() -> list[str]:
    """What an environment needs in order to load a logged lock."""
    return default_pip_requirements()


def get_default_conda_env() -> dict[str, Any]:
    """The same as a conda environment."""
    return default_conda_env()


def save_model(
    lock: SafetyLock,
    path: str | Path,
    mlflow_model: Model | None = None,
    conda_env: dict[str, Any] | str | None = None,
    code_paths: Sequence[str] | None = None,
    pip_requirements: Sequence[str] | str | None = None,
    extra_pip_requirements: Sequence[str] | str | None = None,
    metadata: Mapping[str, Any] | None = None,
    signature_file: bytes | None = None,
) -> None:
    """Save a lock as an MLflow model folder.

    Args:
        lock: The lock.
        path: Folder to write; it must not exist, or be empty.
        mlflow_model: MLflow's description of the model, where it is being logged.
        conda_env: As in every MLflow flavor.
        code_paths: As in every MLflow flavor.
        pip_requirements: As in every MLflow flavor.
        extra_pip_requirements: As in every MLflow flavor.
        metadata: As in every MLflow flavor.
        signature_file: The lock's signature (``safelock lock sign``), written beside it.

    Raises:
        mlflow.exceptions.MlflowException: The folder is not empty, or the environment is not valid.
    """
    folder = Path(path)
    _validate_and_prepare_target_save_path(str(folder))
    code = _validate_and_copy_code_paths(code_paths, str(folder))
    model = mlflow_model if mlflow_model is not None else Model()
    if metadata is not None:
        model.metadata = dict(metadata)
    save_lock(lock, folder / LOCK_FILE)
    if signature_file is not None:
        (folder / LOCK_SIGNATURE_FILE).write_bytes(signature_file)
    head_map(lock).savefig(folder / PLOT_FILE)
    environment = write_environment(
        folder,
        conda_env=conda_env,
        pip_requirements=pip_requirements,
        extra_pip_requirements=extra_pip_requirements,
        default=get_default_pip_requirements(),
    )
    model.add_flavor(
        FLAVOR_NAME,
        lock=LOCK_FILE,
        digest=lock.digest,
        base_model=lock.base_model,
        env=environment,
        code=code,
    )
    model.save(str(folder / MLMODEL_FILE_NAME))


def log_model(
    lock: SafetyLock,
    name: str = "lock",
    *,
    registered_model_name: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> ModelInfo:
    """Log a lock as an MLflow model, with what it is for in params and tags that the UI shows.

    Args:
        lock: The lock.
        name: Name of the logged model.
        registered_model_name: Register it too; ``lock_model_name(lock.base_model)`` is where the gate looks.
        params: Further params.
        tags: Further tags; they end up on the logged model and on the registered version.
        **kwargs: What ``mlflow.models.Model.log`` and ``save_model`` take.

    Returns:
        What MLflow says of the logged model; ``registered_model_version`` holds the version.
    """
    return Model.log(
        artifact_path=None,
        name=name,
        flavor=sys.modules[__name__],
        lock=lock,
        registered_model_name=registered_model_name,
        model_type=MODEL_TYPE,
        params={**describe(lock), **(params or {})},
        tags={**lock_tags(lock), **(tags or {})},
        **kwargs,
    )


def register(lock: SafetyLock, signature_file: bytes | None = None) -> ModelInfo:
    """Log a lock and register it where the gate looks, as the newest lock of its base model."""
    name = lock_model_name(lock.base_model)
    return log_model(lock, registered_model_name=name, signature_file=signature_file)


def load_model(model_uri: str, dst_path: str | None = None) -> SafetyLock:
    """Load a logged lock.

    Args:
        model_uri: Any MLflow model URI or a folder.
        dst_path: Existing folder to download to.

    Raises:
        LockFormatError: The folder's lock is not the one its MLmodel file names.
        LockError: The lock file is not valid.
        mlflow.exceptions.MlflowException: There is no such model, or it has not this flavor.
    """
    folder = Path(_download_artifact_from_uri(artifact_uri=model_uri, output_path=dst_path))
    flavor = _get_flavor_configuration(str(folder), FLAVOR_NAME)
    lock = load_lock(folder / LOCK_FILE)
    if lock.digest != flavor.get("digest"):
        raise LockFormatError(
            f"The lock at {model_uri} has digest {lock.digest}, and its MLmodel file says "
            f"{flavor.get('digest')}."
        )
    return lock


def describe(lock: SafetyLock) -> dict[str, str | int | float]:
    """What people want to know of a lock at a glance: the params of a logged lock."""
    facts: dict[str, str | int | float] = {
        "base_model": lock.base_model,
        "heads": len(lock.heads),
        "default_alpha": lock.metadata.default_alpha,
        "digest": lock.digest,
        "origin": lock.metadata.origin,
        "geometry": str(lock.geometry),
    }
    if lock.metadata.dataset_digest is not None:
        facts["dataset_digest"] = lock.metadata.dataset_digest
    if lock.scores is not None:
        kept = [float(lock.scores[head.layer, head.head]) for head in lock.heads]
        facts["best_score"] = round(max(kept), 6)
        facts["lowest_kept_score"] = round(min(kept), 6)
    return facts


def lock_tags(lock: SafetyLock) -> dict[str, str]:
    """The same as tags of a model version, for people who search the registry; never evidence."""
    return {f"safelock.{key}": str(value) for key, value in describe(lock).items()}


def registered_lock_uri(base_model: str) -> str:
    """``models:/`` URI of the newest registered lock of a base model.

    Raises:
        mlflow.exceptions.MlflowException: No lock is registered for it.
    """
    name = lock_model_name(base_model)
    try:
        # Not by a search, whose filter takes no name with both kinds of quotes.
        versions = MlflowClient().get_registered_model(name).latest_versions
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        versions = []
    if not versions:
        raise MlflowException(
            f"No lock is registered for the base model {base_model!r}: there is no version of {name!r}.",
            error_code=RESOURCE_DOES_NOT_EXIST,
        )
    return f"models:/{name}/{max(int(version.version) for version in versions)}"
