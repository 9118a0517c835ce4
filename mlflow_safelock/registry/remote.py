"""A folder on any store that MLflow knows, of which it downloads whole files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mlflow_safelock.errors import SourceError, UnreachableError
from mlflow_safelock.gate.transient import AGAIN, is_transient
from mlflow_safelock.provenance import ArtifactFile, LocalArtifacts, Span


def source_error(what: str, error: Exception, next_step: str) -> SourceError:
    """The error of a store that raised ``error``, by whether that may be over in a while.

    Args:
        what: What cannot be done, such as ``The file 'x' at gs://… cannot be read``.
        error: What the store's client raised.
        next_step: What to do about it where it lasts.
    """
    if is_transient(error):
        return UnreachableError(f"{what} now: {error}.", next_step=f"{AGAIN} If it lasts: {next_step}")
    return SourceError(f"{what}: {error}.", next_step=next_step)


@dataclass(frozen=True)
class RemoteArtifacts:
    """An artifact folder that MLflow's repository for its scheme reads, whole files at a time.

    Attributes:
        uri: Its URI.
    """

    uri: str

    @property
    def location(self) -> str:
        """The folder's URI."""
        return self.uri

    @property
    def parallel_files(self) -> int:
        """One: MLflow's repository downloads in parallel by itself."""
        return 1

    @property
    def reads_parts(self) -> bool:
        """No: MLflow's repository gives whole files."""
        return False

    def files(self) -> tuple[ArtifactFile, ...]:
        """Every file below the folder, sorted by path; listed once."""
        return self._files

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of one file, which is downloaded once."""
        return self._downloaded(path).read(path, start, length)

    def read_many(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of several parts of one file, which is downloaded once."""
        return self._downloaded(path).read_many(path, spans)

    def _downloaded(self, path: str) -> LocalArtifacts:
        """A local folder in which the file is."""
        local = Path(self._downloads.name)
        if not (local / path).is_file():
            try:
                self._repository.download_artifacts(path, str(local))
            except Exception as error:  # each kind of store raises its own
                raise source_error(
                    f"The file {path!r} at {self.uri} cannot be read",
                    error,
                    "Look whether it is there, and whether this process may read it.",
                ) from error
        return LocalArtifacts(local)

    @cached_property
    def _files(self) -> tuple[ArtifactFile, ...]:
        entries: list[Any] = []
        folders: list[str | None] = [None]
        try:
            while folders:
                for entry in self._repository.list_artifacts(folders.pop()):
                    if entry.is_dir:
                        folders.append(entry.path)
                    else:
                        entries.append(entry)
        except SourceError:
            raise
        except Exception as error:  # each kind of store raises its own
            raise source_error(
                f"The artifacts at {self.uri} cannot be listed",
                error,
                "Look whether they are there, and whether this process may list them.",
            ) from error
        if not entries:
            raise SourceError(
                f"There are no files at {self.uri}.", next_step="Look whether the model was deleted or moved."
            )
        files = (ArtifactFile(entry.path, self._size(entry)) for entry in entries)
        return tuple(sorted(files, key=lambda file: file.path))

    def _size(self, entry: Any) -> int:
        """The size of a file; of a store that tells none, the size of what it gives."""
        if entry.file_size is not None:
            return int(entry.file_size)
        return len(self.read(entry.path))

    @cached_property
    def _repository(self) -> Any:
        try:
            return get_artifact_repository(self.uri)
        except MlflowException as error:
            raise SourceError(f"There is no way to read {self.uri}: {error.message}") from error

    @cached_property
    def _downloads(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="safelock-source-")
