"""Artifact URIs, resolved with the registry's own rights: the one place that knows how.

Inside ``mlflow server`` an ``mlflow-artifacts:`` URI stands for a place below the server's artifact
destination. MLflow's own repository for that scheme would call the server over HTTP, which from within a
request means calling itself, so here the destination is used directly.
"""

from __future__ import annotations

import os
import posixpath
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlparse
from uuid import uuid4

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.utils.models import _parse_model_uri
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from mlflow_safelock.errors import SourceError
from mlflow_safelock.provenance import ArtifactFile, ArtifactReader, LocalArtifacts

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
        client = MlflowClient(tracking_uri=self.tracking_uri)
        try:
            if scheme == "runs":
                run_id, _, path = uri.removeprefix("runs:/").lstrip("/").partition("/")
                return posixpath.join(client.get_run(run_id).info.artifact_uri, path)
            if scheme == "models":
                model_id = _parse_model_uri(uri).model_id
                if model_id is None:
                    raise SourceError(f"The location {uri} is not one of a logged model.")
                return str(client.get_logged_model(model_id).artifact_location)
        except MlflowException as error:
            raise SourceError(f"The location {uri} cannot be resolved: {error.message}") from error
        return uri

    def reader(self, uri: str) -> ArtifactReader:
        """The folder at ``uri``.

        Raises:
            SourceError: The URI names no place that this process can read.
        """
        physical = physical_uri(self.resolve(uri))
        if is_local_uri(physical, is_tracking_or_registry_uri=False):
            return LocalArtifacts(Path(local_file_uri_to_path(physical)))
        return RemoteArtifacts(physical)

    def publish(self, folder: Path, uri: str) -> None:
        """Write a local folder to ``uri``; writing the same once more changes nothing.

        Raises:
            SourceError: It cannot be written.
        """
        physical = physical_uri(uri)
        try:
            if is_local_uri(physical, is_tracking_or_registry_uri=False):
                _publish_locally(folder, Path(local_file_uri_to_path(physical)))
            else:
                get_artifact_repository(physical).log_artifacts(str(folder))
        except (MlflowException, OSError) as error:
            raise SourceError(
                f"The locked model cannot be written to {uri}: {error}.",
                next_step="Let the registry's process write beside the model's artifacts.",
            ) from error


def _publish_locally(folder: Path, destination: Path) -> None:
    """Copy aside and rename, so that nobody ever reads a half-written folder there."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = destination.with_name(f".{destination.name}-{uuid4().hex}")
    aside.mkdir()
    try:
        for path in folder.iterdir():
            shutil.copyfile(path, aside / path.name)
        try:
            aside.rename(destination)
        except OSError:
            if not destination.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class RemoteArtifacts:
    """An artifact folder that MLflow's repository for its scheme reads, whole files at a time."""

    uri: str

    @property
    def location(self) -> str:
        """The folder's URI."""
        return self.uri

    def files(self) -> tuple[ArtifactFile, ...]:
        """Every file below the folder, sorted by path."""
        return self._files

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of one file, which is downloaded once."""
        local = Path(self._downloads.name)
        if not (local / path).is_file():
            try:
                self._repository.download_artifacts(path, str(local))
            except Exception as error:  # each kind of store raises its own
                raise SourceError(f"The file {path!r} at {self.uri} cannot be read: {error}.") from error
        return LocalArtifacts(local).read(path, start, length)

    @cached_property
    def _files(self) -> tuple[ArtifactFile, ...]:
        found: list[ArtifactFile] = []
        folders: list[str | None] = [None]
        try:
            while folders:
                for entry in self._repository.list_artifacts(folders.pop()):
                    if entry.is_dir:
                        folders.append(entry.path)
                    else:
                        found.append(ArtifactFile(entry.path, entry.file_size or 0))
        except Exception as error:  # each kind of store raises its own
            raise SourceError(f"The artifacts at {self.uri} cannot be listed: {error}.") from error
        return tuple(sorted(found))

    @cached_property
    def _repository(self):  # type: ignore[no-untyped-def]
        try:
            return get_artifact_repository(self.uri)
        except MlflowException as error:
            raise SourceError(f"There is no way to read {self.uri}: {error.message}") from error

    @cached_property
    def _downloads(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="safelock-source-")


def physical_uri(uri: str) -> str:
    """Where ``uri`` really lies: below the server's artifact destination for a proxied one.

    Raises:
        SourceError: The URI climbs out of the destination.
    """
    destination = os.environ.get(DESTINATION_VARIABLE)
    parsed = urlparse(uri)
    if parsed.scheme != PROXY_SCHEME or destination is None:
        return uri
    path = unquote(parsed.path).lstrip("/")
    if ".." in PurePosixPath(path).parts or "\\" in path:
        raise SourceError(f"The location {uri} climbs out of the server's artifacts.")
    return posixpath.join(destination, path)
