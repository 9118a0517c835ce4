"""Evidence from artifacts: the receipt in the overlay that a version's location leads to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient
from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

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
from mlflow_safelock.formats import lock_from_bytes
from mlflow_safelock.formats.lock_file import MAX_FILE_BYTES
from mlflow_safelock.provenance import ArtifactReader, LocalArtifacts, LockReference, Receipt

MAX_OVERLAY_BYTES = MAX_FILE_BYTES + (16 << 20)
"""Largest folder that is fetched as an overlay: the largest lock and an input example beside it."""


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

        A receipt is a file where clients may write, so what can be checked is: the overlay against it, its
        lock against the registered one of that name and version, and that it loads through this package.

        Returns:
            The evidence, or ``None`` where there is no receipt.

        Raises:
            VerificationError: There is a receipt, and what it states does not hold or is no promotion.
            SourceError: The artifacts cannot be listed or read.
        """
        entries = self._list(location)
        if RECEIPT_FILE not in {entry.path for entry in entries}:
            return None
        _check_size(entries, location)
        with TemporaryDirectory(prefix="safelock-audit-") as temporary:
            overlay = LocalArtifacts(self._fetch(location, "", Path(temporary)))
            receipt = read_overlay(overlay).receipt
            _check_loader(overlay, location)
        _check_promotion(receipt, location)
        self._check_lock(receipt.predicate.lock, location)
        return Evidence.from_receipt(receipt)

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

    def _list(self, location: str) -> Sequence[FileInfo]:
        try:
            entries: Sequence[FileInfo] = self._repository(location).list_artifacts()
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


def _check_promotion(receipt: Receipt, location: str) -> None:
    predicate = receipt.predicate
    if predicate.promotion is None:
        raise VerificationError(
            f"The locked model at {location} was saved by hand (lock {predicate.lock.digest}, alpha "
            f"{predicate.alpha:g}): no promotion stands behind it."
        )
    if predicate.alpha <= 0.0:
        raise VerificationError(f"The receipt at {location} states alpha {predicate.alpha:g}, which unlocks.")
