"""Evidence from artifacts: the receipt in the locked model that a version's location leads to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient
from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlflow_safelock.apply.config_entry import CONFIG_KEY
from mlflow_safelock.audit.rows import Evidence
from mlflow_safelock.errors import SafelockError, SourceError, VerificationError
from mlflow_safelock.flavors.meta_safetylock import LOCK_FILE
from mlflow_safelock.flavors.overlay import (
    FLAVOR_NAME,
    LOADER_MODULE,
    RECEIPT_FILE,
    read_mlmodel,
    read_overlay,
)
from mlflow_safelock.flavors.standalone import WEIGHTS_FOLDER
from mlflow_safelock.formats import lock_from_bytes
from mlflow_safelock.formats.lock_file import MAX_FILE_BYTES
from mlflow_safelock.provenance import (
    ADDED_BY_CLIENTS,
    RECEIPT_SIGNATURE_FILE,
    ArtifactReader,
    LocalArtifacts,
    LockReference,
    Receipt,
    check_receipt_signature,
)

MAX_OVERLAY_BYTES = MAX_FILE_BYTES + (16 << 20)
"""Largest folder that is fetched as an overlay: the largest lock and an input example beside it. Of a
standalone model it is the largest file that is fetched."""

_NEEDED = ("MLmodel", f"{WEIGHTS_FOLDER}/config.json")
"""What makes a standalone model load as a locked one, beside its weights."""


@dataclass(frozen=True)
class ReceiptReader:
    """Reads receipts through a client that has only what every client has.

    Attributes:
        client: Client of the registry.
        tracking_uri: Where proxied artifacts are fetched through; MLflow's current one where not given.
        registry_uri: The registry.
    """

    client: MlflowClient
    tracking_uri: str | None
    registry_uri: str
    _registered: dict[tuple[str, int], str] = field(default_factory=dict, init=False, repr=False)

    def evidence_at(self, location: str) -> Evidence | None:
        """The promotion that the receipt at a version's download location states.

        A receipt is a file where clients may write, so what can be checked is: the locked model against it,
        its lock against the registered one of that name and version, and that it loads as a locked model. Of
        a standalone model's weights that are the fine-tune's own files, only the sizes are compared. Where
        ``SAFELOCK_PUBLIC_KEYS`` names keys, or ``SAFELOCK_IDENTITIES`` identities, one of them must have
        signed it.

        Returns:
            The evidence, or ``None`` where there is no receipt.

        Raises:
            VerificationError: There is a receipt, and what it states does not hold or is no promotion.
            SourceError: The artifacts cannot be listed or read.
        """
        entries = self._list(location)
        sizes = {entry.path: entry.file_size or 0 for entry in entries}
        if RECEIPT_FILE not in sizes:
            return None
        if sizes[RECEIPT_FILE] > MAX_OVERLAY_BYTES:
            raise VerificationError(f"The receipt at {location} has {sizes[RECEIPT_FILE]} bytes.")
        with TemporaryDirectory(prefix="safelock-audit-") as temporary:
            folder = Path(temporary)
            data = self._fetch(location, RECEIPT_FILE, folder).read_bytes()
            receipt = Receipt.parse(data, origin=f"{location}/{RECEIPT_FILE}")
            if receipt.predicate.carrier == "overlay":
                receipt = self._check_overlay(location, entries, folder)
            else:
                self._check_standalone(location, receipt, folder)
                if RECEIPT_SIGNATURE_FILE in sizes:
                    self._fetch(location, RECEIPT_SIGNATURE_FILE, folder)
            signed_by = check_receipt_signature(receipt, LocalArtifacts(folder))
        _check_promotion(receipt, location)
        self._check_lock(receipt.predicate.lock, location)
        return Evidence.from_receipt(receipt, signed_by)

    def _check_overlay(self, location: str, entries: Sequence[FileInfo], folder: Path) -> Receipt:
        _check_size(entries, location)
        overlay = LocalArtifacts(self._fetch(location, "", folder))
        receipt = read_overlay(overlay).receipt
        _check_loader(overlay, location)
        return receipt

    def _check_standalone(self, location: str, receipt: Receipt, folder: Path) -> None:
        """Compare a standalone model with its receipt, without fetching files of weights."""
        stated, found = receipt.predicate, self._files(location)
        shared = stated.source.fingerprint.of_copies(stated.shared)
        weights = (*shared.files, *stated.patched)
        expected = {*stated.files, *(file.path for file in weights), RECEIPT_FILE}
        for path in sorted(expected ^ (found.keys() - ADDED_BY_CLIENTS - {RECEIPT_SIGNATURE_FILE})):
            what = "is missing" if path in expected else "is not in its receipt"
            raise VerificationError(f"The locked model's file {path!r} at {location} {what}.")
        for path in sorted(set(_NEEDED) - stated.files.keys()):
            raise VerificationError(f"The receipt at {location} says nothing about {path!r}.")
        for file in weights:
            if found[file.path] not in (None, file.size):
                raise VerificationError(
                    f"The locked model's file {file.path!r} at {location} has {found[file.path]} bytes, and "
                    f"the fine-tune's had {file.size}."
                )
        for path, sha256 in stated.files.items():
            size = found[path]
            if size is not None and size > MAX_OVERLAY_BYTES and path not in _NEEDED:
                continue
            data = self._fetch(location, path, folder).read_bytes()
            if hashlib.sha256(data).hexdigest() != sha256:
                raise VerificationError(
                    f"The locked model's file {path!r} at {location} is not the one of its receipt."
                )
        _check_standalone_loader(LocalArtifacts(folder), receipt, location)

    def _files(self, location: str) -> dict[str, int | None]:
        """Size of every file below a location, by path; ``None`` where the store does not tell it."""
        found: dict[str, int | None] = {}
        folders: list[str | None] = [None]
        while folders:
            for entry in self._list(location, folders.pop()):
                if entry.is_dir:
                    folders.append(entry.path)
                else:
                    found[entry.path] = entry.file_size
        return found

    def _check_lock(self, stated: LockReference, location: str) -> None:
        if stated.model is None or stated.version is None:
            raise VerificationError(f"The receipt at {location} does not say where its lock is registered.")
        key = stated.model, stated.version
        if key not in self._registered:
            self._registered[key] = self._registered_digest(*key)
        if self._registered[key] != stated.digest:
            raise VerificationError(
                f"The receipt at {location} names the lock {stated.model} version {stated.version} with "
                f"digest {stated.digest}, and the registered one has {self._registered[key]}."
            )

    def _registered_digest(self, model: str, version: int) -> str:
        uri = f"models:/{model}/{version}"
        try:
            location = self.client.get_model_version_download_uri(model, str(version))
            with TemporaryDirectory(prefix="safelock-audit-") as temporary:
                data = self._fetch(location, LOCK_FILE, Path(temporary)).read_bytes()
                return lock_from_bytes(data, origin=uri).digest
        except (MlflowException, SafelockError, OSError) as error:
            raise SourceError(f"The lock {uri} that a receipt names cannot be read: {error}.") from error

    def _list(self, location: str, folder: str | None = None) -> Sequence[FileInfo]:
        try:
            entries: Sequence[FileInfo] = self._repository(location).list_artifacts(folder)
        except Exception as error:  # each kind of store raises its own
            raise SourceError(f"The artifacts at {location} cannot be listed: {error}.") from error
        return entries

    def _fetch(self, location: str, path: str, folder: Path) -> Path:
        try:
            return Path(self._repository(location).download_artifacts(path, str(folder)))
        except Exception as error:  # each kind of store raises its own
            raise SourceError(f"The artifacts at {location} cannot be read: {error}.") from error

    def _repository(self, location: str):  # type: ignore[no-untyped-def]
        return get_artifact_repository(
            location, tracking_uri=self.tracking_uri, registry_uri=self.registry_uri
        )


def _check_size(entries: Sequence[FileInfo], location: str) -> None:
    size = sum(entry.file_size or 0 for entry in entries)
    if size > MAX_OVERLAY_BYTES or any(entry.is_dir for entry in entries):
        raise VerificationError(f"There is a receipt at {location}, beside more than an overlay holds.")


def _check_loader(overlay: ArtifactReader, location: str) -> None:
    """An overlay that MLflow would load in another way than through this package proves nothing."""
    flavors = read_mlmodel(overlay)["flavors"]
    loader = flavors["python_function"]
    if (
        set(flavors) != {"python_function", FLAVOR_NAME}
        or loader.get("loader_module") != LOADER_MODULE
        or loader.get("code")
    ):
        raise VerificationError(f"The model at {location} has a receipt and is not loaded as a locked model.")


def _check_standalone_loader(model: ArtifactReader, receipt: Receipt, location: str) -> None:
    """A standalone model is loaded by MLflow's own flavor, from the folder that the lock was written into."""
    flavors, stated = read_mlmodel(model)["flavors"], receipt.predicate
    transformers, loader = flavors.get("transformers"), flavors["python_function"]
    config = json.loads(model.read(f"{WEIGHTS_FOLDER}/config.json"))
    entry = config.get(CONFIG_KEY) if isinstance(config, dict) else None
    if (
        set(flavors) != {"python_function", "transformers", FLAVOR_NAME}
        or not isinstance(transformers, dict)
        or transformers.get("model_binary") != WEIGHTS_FOLDER
        or transformers.get("peft_adaptor")
        or loader.get("loader_module") != "mlflow.transformers"
        or loader.get("code")
        or not isinstance(entry, dict)
        or (entry.get("lock"), entry.get("alpha")) != (stated.lock.digest, stated.alpha)
    ):
        raise VerificationError(f"The model at {location} has a receipt and is not loaded as a locked model.")


def _check_promotion(receipt: Receipt, location: str) -> None:
    predicate = receipt.predicate
    if predicate.promotion is None:
        raise VerificationError(
            f"The locked model at {location} was saved by hand (lock {predicate.lock.digest}, alpha "
            f"{predicate.alpha:g}): no promotion stands behind it."
        )
    if predicate.alpha <= 0.0:
        raise VerificationError(f"The receipt at {location} states alpha {predicate.alpha:g}, which unlocks.")
