"""MLflow flavor of a locked fine-tune: ``mlflow.pyfunc.load_model`` gives the model with the lock applied.

Nothing here hands out an unlocked model: the folder, the lock, the source and the biases in place are checked
before a model is returned, and any difference raises.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.model import ModelInfo
from mlflow.tracking.artifact_utils import _download_artifact_from_uri
from mlflow.utils.model_utils import _validate_and_prepare_target_save_path

from mlflow_safelock.apply.adapters import refuse_untold_adapters
from mlflow_safelock.apply.architectures import attention_of
from mlflow_safelock.apply.effect import check_effect, shares_of
from mlflow_safelock.apply.in_force import pushes_in_force
from mlflow_safelock.apply.in_memory import apply_lock
from mlflow_safelock.errors import SourceError, VerificationError
from mlflow_safelock.flavors.environment import default_conda_env, default_pip_requirements
from mlflow_safelock.flavors.overlay import (
    FLAVOR_NAME,
    SOURCE_OPTION,
    Overlay,
    read_mlmodel,
    read_overlay,
    write_overlay,
)
from mlflow_safelock.flavors.own_biases import OwnBiases
from mlflow_safelock.flavors.stock_loading import (
    check_stock_code,
    check_stock_loading,
    read_config,
    refuse_folder_for_base,
)
from mlflow_safelock.forging.base_weights import kinship_of
from mlflow_safelock.kinship import MIN_KINSHIP
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import (
    LocalArtifacts,
    LockReference,
    OwnBiasesRule,
    check_every_byte,
    configured_signer,
)

__all__ = [
    "FLAVOR_NAME",
    "get_default_conda_env",
    "get_default_pip_requirements",
    "load_model",
    "log_model",
    "save_model",
]

ROUNDING = 0.02
"""By how much a kinship may differ from what the gate found, as a model is loaded in another dtype."""


def get_default_pip_requirements() -> list[str]:
    """What an environment needs in order to load a locked model, besides what the fine-tune needs."""
    return default_pip_requirements()


def get_default_conda_env() -> dict[str, Any]:
    """The same as a conda environment."""
    return default_conda_env()


def save_model(
    lock: SafetyLock,
    path: str | Path,
    source_uri: str,
    alpha: float | None = None,
    mlflow_model: Model | None = None,
    own_biases: OwnBiasesRule = "check",
) -> None:
    """Save the overlay of a fine-tune that was logged with ``mlflow.transformers``.

    Args:
        lock: The lock of the fine-tune's base model.
        path: Folder to write; it must not exist, or be empty.
        source_uri: Any MLflow model URI of the fine-tune, or its folder.
        alpha: Strength; the lock's default where it is not given.
        mlflow_model: MLflow's description of the model, where it is being logged.
        own_biases: Whether biases of the model's own are compared with the lock's, now and when it is loaded;
            ``ignore`` is for bases that have such biases themselves.

    Raises:
        SourceError: The source cannot be reached, or is not a model of ``mlflow.transformers``.
        ApplyError: The lock cannot be applied to it.
        VerificationError: It does not descend from the lock's base, or too little of the push arrives in it,
            or its own biases take half of the push back, or are a lock's.
    """
    folder = Path(path)
    strength = lock.metadata.default_alpha if alpha is None else alpha
    source = _fetch(source_uri)
    looks_at_biases = own_biases == "check"
    implementation = _locked_implementation(source, lock, strength, {}, looks_at_biases=looks_at_biases)
    _check_descent(implementation, lock, source_uri)
    _validate_and_prepare_target_save_path(str(folder))
    write_overlay(
        folder,
        LocalArtifacts(source),
        source_uri,
        lock,
        LockReference(digest=lock.digest, base_model=lock.base_model, model=None, version=None),
        strength,
        None,
        mlflow_model,
        signer=configured_signer(),
        own_biases=own_biases,
    )


def log_model(
    lock: SafetyLock,
    name: str = "locked_model",
    *,
    source_uri: str,
    alpha: float | None = None,
    own_biases: OwnBiasesRule = "check",
    **kwargs: Any,
) -> ModelInfo:
    """Log the overlay of a fine-tune; arguments are those of ``save_model`` and ``mlflow.models.Model.log``.

    Raises:
        SourceError: The source cannot be reached, or is not a model of ``mlflow.transformers``.
        ApplyError: The lock cannot be applied to it.
        VerificationError: It does not descend from the lock's base, too little of the push arrives in it, or
            its own biases, or an adapter, take it back.
    """
    return Model.log(
        artifact_path=None,
        name=name,
        flavor=sys.modules[__name__],
        lock=lock,
        source_uri=source_uri,
        alpha=alpha,
        own_biases=own_biases,
        **kwargs,
    )


def load_model(model_uri: str, dst_path: str | None = None, *, source: str | None = None) -> Any:
    """Load a locked model as a ``transformers`` pipeline with the lock applied.

    Args:
        model_uri: Any MLflow model URI of a locked model, or its folder.
        dst_path: Existing folder to download the locked model to.
        source: Local copy of the fine-tune, used in place of a download; it must have the fingerprint.

    Raises:
        VerificationError: Something is not what the receipt says, or too little of the lock's push arrives.
        SourceError: The fine-tune cannot be reached.
    """
    folder = _download_artifact_from_uri(artifact_uri=model_uri, output_path=dst_path)
    return _load_pyfunc(folder, {SOURCE_OPTION: source}).get_raw_model()


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Any:
    """What ``mlflow.pyfunc.load_model`` calls."""
    options = dict(model_config or {})
    copy = options.pop(SOURCE_OPTION, None)
    overlay = read_overlay(LocalArtifacts(Path(path)))
    source = fetch_source(overlay, copy)
    predicate = overlay.receipt.predicate
    promotion = predicate.promotion
    implementation = _locked_implementation(
        source,
        overlay.lock,
        predicate.alpha,
        options,
        looks_at_biases=predicate.own_biases == "check",
    )
    kinship = None if promotion is None else promotion.kinship
    _check_descent(implementation, overlay.lock, predicate.source.uri, kinship)
    return implementation


def _check_descent(
    implementation: Any, lock: SafetyLock, source_uri: str, found: float | None = None
) -> None:
    """Compare a loaded model with the sketch of the base that its lock was made for.

    Args:
        implementation: The loaded model.
        lock: The lock.
        source_uri: Where the model is, for the error.
        found: The kinship that the gate found in the stored weights, by whatever policy: the model, which it
            did not load, must have it as well.

    Raises:
        VerificationError: It does not descend from it.
    """
    if lock.sketch is None:
        return
    kinship = kinship_of(attention_of(implementation.get_raw_model().model), lock.sketch)
    least = MIN_KINSHIP if found is None else min(MIN_KINSHIP, found - ROUNDING)
    if kinship is not None and kinship < least:
        raise VerificationError(
            f"The model at {source_uri} does not descend from {lock.base_model!r}, which the lock was made "
            f"for: the cosine between the weights of both is {kinship:.3f}, below {least:.3g}.",
            next_step="Lock it with a lock of its own base.",
        )


def fetch_source(overlay: Overlay, copy: str | None = None) -> Path:
    """The folder of an overlay's fine-tune, downloaded where no local copy is named, and checked.

    Every byte of it is compared where the fine-tune was measured before its promotion, otherwise blocks.

    Raises:
        SourceError: It cannot be reached.
        VerificationError: It has not the fingerprint that the receipt names.
    """
    reference = overlay.receipt.predicate.source
    folder = _fetch(reference.uri) if copy is None else Path(copy)
    check_every_byte(reference.fingerprint, LocalArtifacts(folder))
    return folder


def _fetch(uri: str) -> Path:
    try:
        return Path(_download_artifact_from_uri(artifact_uri=uri))
    except (MlflowException, OSError) as error:
        raise SourceError(
            f"The fine-tune behind the locked model cannot be reached at {uri}: {error}.",
            next_step="Name a local copy with model_config={'safelock_source': ...}, or write a standalone "
            "folder where it can be reached: safelock export.",
        ) from error


def _locked_implementation(
    source: Path, lock: SafetyLock, alpha: float, options: Mapping[str, Any], *, looks_at_biases: bool
) -> Any:
    """MLflow's own pyfunc implementation of the fine-tune, locked."""
    described = read_mlmodel(LocalArtifacts(source))
    flavors = described["flavors"]
    loader = flavors["python_function"].get("loader_module")
    if loader != "mlflow.transformers":
        raise SourceError(
            f"The fine-tune at {source} is loaded by {loader}, not by mlflow.transformers.",
            next_step="Log it with mlflow.transformers.log_model.",
        )
    artifacts = LocalArtifacts(source)
    if flavors.get("transformers", {}).get("peft_adaptor"):
        check_stock_code(artifacts, described)
        refuse_folder_for_base(described)
    else:
        check_stock_loading(artifacts, described, read_config(artifacts, described))
    implementation = mlflow.transformers._load_pyfunc(str(source), dict(options) or None)
    model, name = implementation.get_raw_model().model, f"the model at {source}"
    refuse_untold_adapters(model)
    own_biases = OwnBiases(model, lock.layers) if looks_at_biases and lock.unit_biases is not None else None
    handle = apply_lock(model, lock, alpha)
    handle.verify(recompute=False)  # made from these very weights a moment ago
    if lock.unit_biases is not None:
        pushes = pushes_in_force(model)
        check_effect(pushes, lock, alpha, name)
        if own_biases is not None:
            own_biases.check(lock, alpha, shares_of(pushes, lock, alpha), name)
    return implementation
