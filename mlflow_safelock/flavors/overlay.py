"""The overlay: a locked model of some tens of kilobytes that points to its unlocked source.

Its folder holds ``MLmodel`` (the fine-tune's own signature, and this package as its loader), the lock, the
receipt, the fine-tune's input example and its environment with this package added. It carries no
``transformers`` flavor, since its weights, which it does not hold, are unlocked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME

from mlflow_safelock.errors import SourceError, VerificationError
from mlflow_safelock.flavors.environment import default_pip_requirements, pinned, write_environment
from mlflow_safelock.flavors.meta_safetylock import LOCK_FILE
from mlflow_safelock.formats import lock_from_bytes, lock_to_bytes
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import (
    ArtifactReader,
    ListedArtifacts,
    LockReference,
    OwnBiasesRule,
    Promotion,
    Receipt,
    ReceiptPredicate,
    Signer,
    SourceFingerprint,
    SourceReference,
    check_receipt_signature,
    sign_receipt,
    take_fingerprint,
    tool_versions,
)

FLAVOR_NAME = "safelock_locked_model"
LOADER_MODULE = "mlflow_safelock.flavors.locked_model"
RECEIPT_FILE = "receipt.json"
SOURCE_OPTION = "safelock_source"
"""Key of ``model_config`` that names a local copy of the source."""

COPIED_FROM_SOURCE = ("input_example.json", "serving_input_example.json")

KEPT_BYTES = 1 << 16
"""Size of YAML files whose values are kept for whoever reads the same bytes next."""

MAX_DEPTH = 100
"""How deeply the values of a YAML file that somebody logged may be nested."""

_SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SAFE_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""The same plain values through libyaml in a tenth of the time, where PyYAML was built with it."""


@dataclass(frozen=True)
class Overlay:
    """An overlay that was read and found whole.

    Attributes:
        receipt: What it states.
        lock: The lock it carries, with the digest that the receipt names.
    """

    receipt: Receipt
    lock: SafetyLock


PYFUNC_LOADER = "mlflow.transformers"
"""What MLflow writes down as the loader of a model of its transformers flavor."""


def write_overlay(
    folder: Path,
    source: ArtifactReader,
    source_uri: str,
    lock: SafetyLock,
    lock_reference: LockReference,
    alpha: float,
    promotion: Promotion | None,
    mlflow_model: Model | None = None,
    fingerprint: SourceFingerprint | None = None,
    signer: Signer | None = None,
    own_biases: OwnBiasesRule = "check",
) -> Receipt:
    """Write the overlay of ``source`` into an empty folder and return its receipt.

    Args:
        folder: Existing, empty folder.
        source: The fine-tune's artifacts, an MLflow model folder.
        source_uri: Where a consumer will find them.
        lock: The lock.
        lock_reference: Where the lock comes from.
        alpha: Strength.
        promotion: The gate's decision; ``None`` for an overlay saved by hand.
        mlflow_model: MLflow's description of a model that is being logged; otherwise the fine-tune's own.
        fingerprint: The source's, where it was measured before; otherwise it is taken now.
        signer: What its receipt is signed with; ``None``: it is not signed.
        own_biases: Whether the loader compares the model's own biases with the lock's.

    Raises:
        SourceError: The source is not an MLflow model, or cannot be read.
        SigstoreError: Its receipt is to be signed by an identity, and cannot be.
    """
    source = ListedArtifacts(source)
    fingerprint = fingerprint or take_fingerprint(source)
    own = read_mlmodel(source)
    paths = {file.path for file in source.files()}
    for name in COPIED_FROM_SOURCE:
        if name in paths:
            (folder / name).write_bytes(source.read(name))
    (folder / LOCK_FILE).write_bytes(lock_to_bytes(lock))
    environment = _write_source_environment(folder, source, paths)
    model = _describe(own, mlflow_model)
    model.add_flavor(
        "python_function",
        loader_module=LOADER_MODULE,
        python_version=own["flavors"]["python_function"].get("python_version"),
        env=environment,
        config={**(own["flavors"]["python_function"].get("config") or {}), SOURCE_OPTION: None},
    )
    model.add_flavor(FLAVOR_NAME, base_model=lock.base_model, lock_digest=lock.digest, alpha=float(alpha))
    # As ``model.save`` does, which has no use for libyaml.
    described = yaml.dump(model.to_dict(), Dumper=_SAFE_DUMPER, default_flow_style=False)
    (folder / MLMODEL_FILE_NAME).write_text(described)
    receipt = Receipt.about(
        ReceiptPredicate(
            source=SourceReference(uri=source_uri, fingerprint=fingerprint),
            lock=lock_reference,
            alpha=float(alpha),
            carrier="overlay",
            promotion=promotion,
            own_biases=own_biases,
            files={path.name: _sha256(path.read_bytes()) for path in sorted(folder.iterdir())},
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            tools=tool_versions(),
        )
    )
    (folder / RECEIPT_FILE).write_bytes(receipt.to_bytes())
    sign_receipt(receipt, folder, signer)
    return receipt


def read_overlay(overlay: ArtifactReader, *, signature: bool = True) -> Overlay:
    """Read an overlay and check its own files, its lock and its receipt against each other.

    Args:
        overlay: Its folder.
        signature: Whether the receipt's is looked at, where that is asked for.

    Raises:
        VerificationError: A file is missing or changed, the lock is not the one of the receipt, or the
            receipt is not signed where that is asked for.
    """
    try:
        receipt = Receipt.parse(overlay.read(RECEIPT_FILE), origin=f"{overlay.location}/{RECEIPT_FILE}")
    except SourceError as error:
        raise VerificationError(
            f"There is no receipt at {overlay.location}.", next_step="Promote the version again."
        ) from error
    if signature:
        check_receipt_signature(receipt, overlay)
    stated = receipt.predicate.files
    for name in (MLMODEL_FILE_NAME, LOCK_FILE):
        if name not in stated:
            raise VerificationError(f"The receipt at {overlay.location} says nothing about {name!r}.")
    for name, sha256 in stated.items():
        try:
            data = overlay.read(name)
        except SourceError as error:
            raise VerificationError(
                f"The locked model's file {name!r} is missing at {overlay.location}."
            ) from error
        if _sha256(data) != sha256:
            raise VerificationError(
                f"The locked model's file {name!r} at {overlay.location} is not the one of its receipt.",
                next_step="Promote the version again.",
            )
    lock = lock_from_bytes(overlay.read(LOCK_FILE), origin=f"{overlay.location}/{LOCK_FILE}")
    reference = receipt.predicate.lock
    if lock.digest != reference.digest or lock.base_model != reference.base_model:
        raise VerificationError(
            f"The lock at {overlay.location} is {lock.digest} for {lock.base_model}, and the receipt names "
            f"{reference.digest} for {reference.base_model}."
        )
    return Overlay(receipt, lock)


def read_mlmodel(reader: ArtifactReader) -> dict[str, Any]:
    """The MLmodel file of a model folder, as plain values.

    Raises:
        SourceError: There is none, or it is not one with a pyfunc flavor.
    """
    try:
        values = _plain_values(reader.read(MLMODEL_FILE_NAME))
    except (SourceError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise SourceError(
            f"There is no readable {MLMODEL_FILE_NAME} file at {reader.location}.",
            next_step="Log the model with mlflow.transformers.log_model.",
        ) from error
    flavors = values.get("flavors") if isinstance(values, dict) else None
    if not isinstance(flavors, dict) or not isinstance(flavors.get("python_function"), dict):
        raise SourceError(
            f"The {MLMODEL_FILE_NAME} file at {reader.location} has no python_function flavor.",
            next_step="Log the model with mlflow.transformers.log_model.",
        )
    return dict(values)


def foreign_loader(flavors: Mapping[str, Any]) -> str | None:
    """The module that ``mlflow.pyfunc`` loads a model with, where it is not MLflow's own for transformers."""
    generic = flavors.get("python_function")
    loader = generic.get("loader_module") if isinstance(generic, Mapping) else None
    return None if loader in (None, PYFUNC_LOADER) else str(loader)


def _describe(own: Mapping[str, Any], mlflow_model: Model | None) -> Model:
    """The fine-tune's description without its flavors, or a new one with its signature and input example."""
    source = Model.from_dict(dict(own))
    source.flavors = {}
    if mlflow_model is None:
        return source
    mlflow_model.signature = source.signature
    mlflow_model.saved_input_example_info = source.saved_input_example_info
    return mlflow_model


def _write_source_environment(folder: Path, source: ArtifactReader, paths: set[str]) -> dict[str, str]:
    """The fine-tune's environment with this package in it, or this package's own where it has none."""
    names = {"requirements.txt", "conda.yaml", "python_env.yaml"}
    if not names <= paths:
        return write_environment(folder, default=default_pip_requirements())
    wanted = pinned("mlflow-safelock")
    requirements = source.read("requirements.txt").decode().splitlines()
    (folder / "requirements.txt").write_text("\n".join([*requirements, wanted]) + "\n")
    (folder / "python_env.yaml").write_bytes(source.read("python_env.yaml"))
    try:
        conda = _plain_values(source.read("conda.yaml"))
        for dependency in conda.get("dependencies", []):
            if isinstance(dependency, dict) and isinstance(dependency.get("pip"), list):
                dependency["pip"].append(wanted)
        (folder / "conda.yaml").write_text(yaml.dump(conda, Dumper=_SAFE_DUMPER, sort_keys=False))
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise SourceError(
            f"The conda.yaml file at {source.location} describes no environment.",
            next_step="Log the model with mlflow.transformers.log_model.",
        ) from error
    if "constraints.txt" in paths:
        (folder / "constraints.txt").write_bytes(source.read("constraints.txt"))
    return {"conda": "conda.yaml", "virtualenv": "python_env.yaml"}


def _plain_values(data: bytes) -> Any:
    """What is in a YAML file, as values that are the caller's own.

    Of small ones the last few are kept: a promotion reads some twice, and others have the same.
    """
    return deepcopy(_kept_values(data)) if len(data) <= KEPT_BYTES else _parsed_values(data)


@lru_cache(maxsize=16)
def _kept_values(data: bytes) -> Any:
    return _parsed_values(data)


def _parsed_values(data: bytes) -> Any:
    """What is in a YAML file; one that is nested deeply would end the process in libyaml."""
    depth = 0
    for event in yaml.parse(data, Loader=_SAFE_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} times")
    return yaml.load(data, _SAFE_LOADER)  # noqa: S506


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
