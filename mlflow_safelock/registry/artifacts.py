"""Artifact URIs, resolved with the registry's own rights: the one place that knows how.

Inside ``mlflow server`` an ``mlflow-artifacts:`` URI stands for a place below the server's artifact
destination. MLflow's own repository for that scheme would call the server over HTTP, which from within a
request means calling itself, so here the destination is used directly.
"""

from __future__ import annotations

import os
import posixpath
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlparse
from uuid import uuid4

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.utils.models import _parse_model_uri
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from mlflow_safelock.apply.checkpoint.progress import Progress, silent
from mlflow_safelock.errors import SourceError
from mlflow_safelock.flavors.standalone import Standalone
from mlflow_safelock.gate.failpoints import reach
from mlflow_safelock.gate.places import folder_beside
from mlflow_safelock.gate.ports import LockedFolder, Writer
from mlflow_safelock.gate.source import HubReference
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import (
    ArtifactReader,
    LocalArtifacts,
    SourceFingerprint,
    kept_digests,
    measure,
)
from mlflow_safelock.registry.beside import delete_folder, found_folders
from mlflow_safelock.registry.derived import derive_by_download, derive_locally, derive_on_s3
from mlflow_safelock.registry.hub import write_weights
from mlflow_safelock.registry.proxied import PROXIED_SCHEMES, ProxiedArtifacts
from mlflow_safelock.registry.remote import RemoteArtifacts, source_error
from mlflow_safelock.registry.s3 import SCHEME, S3Artifacts
from mlflow_safelock.registry.s3_publication import S3Publication

DESTINATION_VARIABLE = "_MLFLOW_SERVER_ARTIFACT_DESTINATION"
"""Environment variable in which ``mlflow server`` tells its workers the artifact destination."""

PROXY_SCHEME = "mlflow-artifacts"


@dataclass(frozen=True)
class RegistryArtifacts:
    """Artifacts as the registry's own process reaches them.

    Attributes:
        tracking_uri: Where logged models and runs are looked up; MLflow's current one where not given.
    """

    tracking_uri: str | None = None

    def resolve(self, uri: str) -> str:
        """The storage URI behind a ``models:/m-…`` or ``runs:/…`` URI; any other URI as it is.

        Raises:
            SourceError: There is no such run or logged model.
        """
        scheme = urlparse(uri).scheme
        if scheme not in ("runs", "models"):
            return uri
        client = MlflowClient(tracking_uri=self.tracking_uri)
        try:
            if scheme == "runs":
                run_id, _, path = uri.removeprefix("runs:/").lstrip("/").partition("/")
                return posixpath.join(client.get_run(run_id).info.artifact_uri, path)
            model_id = _parse_model_uri(uri).model_id
            if model_id is None:
                raise SourceError(f"The location {uri} is not one of a logged model.")
            return str(client.get_logged_model(model_id).artifact_location)
        except MlflowException as error:
            raise source_error(f"The location {uri} cannot be resolved", error, "") from error

    def reader(self, uri: str) -> ArtifactReader:
        """The folder at ``uri``.

        Raises:
            SourceError: The URI names no place that this process can read.
        """
        physical = physical_uri(self.resolve(uri))
        if is_local_uri(physical, is_tracking_or_registry_uri=False):
            return LocalArtifacts(Path(local_file_uri_to_path(physical)))
        scheme = urlparse(physical).scheme
        if scheme == SCHEME:
            return S3Artifacts(physical)
        return ProxiedArtifacts(physical) if scheme in PROXIED_SCHEMES else RemoteArtifacts(physical)

    def publish(self, folder: Path, uri: str) -> None:
        """Write a local folder to ``uri``; writing the same once more changes nothing.

        Raises:
            SourceError: It cannot be written.
        """
        physical = physical_uri(uri)
        try:
            if is_local_uri(physical, is_tracking_or_registry_uri=False):
                _publish_locally(folder, Path(local_file_uri_to_path(physical)))
            elif urlparse(physical).scheme == SCHEME:
                with S3Publication(S3Artifacts(physical)) as publication:
                    publication.put_folder(folder)
            else:
                _publish_remotely(folder, get_artifact_repository(physical))
        except (MlflowException, OSError) as error:
            raise source_error(
                f"The locked model cannot be written to {uri}",
                error,
                "Let the registry's process write beside the model's artifacts.",
            ) from error

    def add_weights_from_hub(self, uri: str, reference: HubReference) -> None:
        """Write the weights of a hub's model into the folder at ``uri``; the MLmodel file comes last.

        Raises:
            SourceError: They cannot be fetched or written.
        """
        physical = physical_uri(self.resolve(uri))
        try:
            with TemporaryDirectory(prefix="safelock-") as temporary:
                folder = Path(temporary) / "model"
                folder.mkdir()
                write_weights(self.reader(uri).read(MLMODEL_FILE_NAME), reference, folder)
                _publish_remotely(folder, get_artifact_repository(physical))
        except SourceError:
            raise
        except Exception as error:  # the hub's client, transformers and each kind of store raise their own
            raise source_error(
                f"The weights of the model at {uri} cannot be fetched and written there",
                error,
                "Let this process reach the hub and write there, and do it again.",
            ) from error

    def measure(self, uri: str, progress: Progress = silent) -> SourceFingerprint:
        """Read every byte of the folder at ``uri``; after a failure it goes on where it was, on this machine.

        Raises:
            SourceError: Something cannot be read.
            VerificationError: Something was changed meanwhile.
        """
        reader = self.reader(uri)
        kept = kept_digests(reader.location)
        measured = measure(reader, kept, progress)
        kept.forget()
        return measured

    def locked_folders(self, original: str) -> Sequence[LockedFolder]:
        """The folders of locked models beside a fine-tune, as far as this package wrote them.

        Raises:
            SourceError: They cannot be listed.
        """
        return found_folders(folder_beside(original), physical_uri(folder_beside(original)))

    def place(self, uri: str) -> str:
        """Where a URI really lies: links are followed on a file system, and so is the server's proxy."""
        physical = physical_uri(uri)
        if is_local_uri(physical, is_tracking_or_registry_uri=False):
            return str(Path(local_file_uri_to_path(physical)).resolve())
        return physical.rstrip("/")

    def delete_locked_folder(self, location: str) -> None:
        """Delete one of the folders that ``locked_folders`` names, and nothing else.

        Raises:
            SourceError: It is none of them, or cannot be deleted.
        """
        delete_folder(physical_uri(location))

    def derive(
        self, original: str, uri: str, lock: SafetyLock, write: Writer, progress: Progress = silent
    ) -> Standalone:
        """Write a standalone model to ``uri`` that shares its weights with the model at ``original``.

        Between two places of one file system, or of S3, nothing but the lock's share of the weights is read;
        from any other store the fine-tune is fetched whole.

        Raises:
            SourceError: Something cannot be read or written.
        """
        source, physical = self.reader(original), physical_uri(uri)
        try:
            if isinstance(source, LocalArtifacts):
                return derive_locally(source.folder, Path(local_file_uri_to_path(physical)), write)
            if isinstance(source, S3Artifacts):
                return derive_on_s3(source, S3Artifacts(physical), lock, write, progress)
            return derive_by_download(source, lambda folder: self.publish(folder, uri), write, progress)
        except OSError as error:
            raise source_error(
                f"The locked model cannot be written to {uri}",
                error,
                "Make room, or let this process write beside the model's artifacts.",
            ) from error


def _publish_locally(folder: Path, destination: Path) -> None:
    """Copy aside and rename, so that nobody ever reads a half-written folder there."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = destination.with_name(f".{destination.name}-{uuid4().hex}")
    try:
        shutil.copytree(folder, aside, copy_function=shutil.copyfile)
        reach("artifacts-aside")
        try:
            aside.rename(destination)
        except OSError:
            if not destination.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _publish_remotely(folder: Path, repository: Any) -> None:
    """Write file by file, and last the MLmodel file, which makes a folder a model."""
    files = (path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: (path == folder / MLMODEL_FILE_NAME, path)):
        below = path.relative_to(folder).parent.as_posix()
        repository.log_artifact(str(path), None if below == "." else below)


def physical_uri(uri: str) -> str:
    """Where ``uri`` really lies: below the server's artifact destination for a proxied one.

    Raises:
        SourceError: The URI climbs out of the destination.
    """
    destination = os.environ.get(DESTINATION_VARIABLE)
    parsed = urlparse(uri)
    if parsed.scheme != PROXY_SCHEME or destination is None:
        return uri
    path = plain = unquote(parsed.path).lstrip("/")
    while (unquoted := unquote(plain)) != plain:  # whoever takes the path for a URI unquotes it once more
        plain = unquoted
    if ".." in PurePosixPath(plain).parts or "\\" in plain:
        raise SourceError(f"The location {uri} climbs out of the server's artifacts.")
    return posixpath.join(destination, path)
