"""The artifact destination: whether it can be reached, and whether what is written there can be read."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlparse
from uuid import uuid4

from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from mlflow_safelock.errors import SourceError
from mlflow_safelock.operations.findings import Finding
from mlflow_safelock.registry.artifacts import DESTINATION_VARIABLE, RegistryArtifacts
from mlflow_safelock.registry.s3 import SCHEME, bucket_owner, s3_client
from mlflow_safelock.registry.s3_errors import s3_errors
from mlflow_safelock.registry.schemes import shown_uri

CHECK = "artifacts"

ROOT_VARIABLE = "_MLFLOW_SERVER_ARTIFACT_ROOT"
"""Environment variable in which ``mlflow server`` tells its workers where new experiments put artifacts."""

SERVES_VARIABLE = "_MLFLOW_SERVER_SERVE_ARTIFACTS"
"""Environment variable in which it tells them whether clients reach artifacts through the server."""

ANSWERS_WITHIN = 5.0
"""Seconds that a store has for each answer."""

PROBE = ".safelock-doctor-"
PROBE_FILE = "probe.txt"


def server_destination() -> str | None:
    """Where this server's artifacts go; ``None`` outside a server."""
    if os.environ.get(SERVES_VARIABLE) == "true":
        return os.environ.get(DESTINATION_VARIABLE)
    return os.environ.get(ROOT_VARIABLE)


def reach(destination: str) -> Finding:
    """Whether the destination answers; nothing is written.

    Raises:
        SourceError: It does not.
    """
    shown = _shown(destination)
    if is_local_uri(destination, is_tracking_or_registry_uri=False):
        _refuse_unwritable(Path(local_file_uri_to_path(destination)))
    elif urlparse(destination).scheme == SCHEME:
        parsed = urlparse(destination)
        with s3_errors(f"The artifact destination {shown}"):
            s3_client(ANSWERS_WITHIN).list_objects_v2(
                Bucket=parsed.netloc, Prefix=parsed.path.lstrip("/"), MaxKeys=1, **bucket_owner()
            )
    else:
        try:
            get_artifact_repository(destination).list_artifacts()
        except Exception as error:  # each kind of store raises its own
            raise SourceError(
                f"The artifact destination {shown} cannot be listed ({type(error).__name__}).",
                next_step="Look whether it is there, and whether this process may read and write it.",
            ) from error
    return Finding(CHECK, "ok", f"The artifact destination {shown} answers.")


def write_and_read_back(destination: str) -> Finding:
    """Write a small file to the destination, read it back and delete it.

    Raises:
        SourceError: One of these does not work.
    """
    shown, content = _shown(destination), uuid4().hex
    if is_local_uri(destination, is_tracking_or_registry_uri=False):
        folder = Path(local_file_uri_to_path(destination))
        if not folder.exists():
            _refuse_unwritable(folder)
            return Finding(CHECK, "ok", f"The artifact destination {shown} is made at the first write.")
    artifacts, uri = RegistryArtifacts(), posixpath.join(destination, f"{PROBE}{content}")
    with TemporaryDirectory(prefix="safelock-") as temporary:
        (Path(temporary) / PROBE_FILE).write_text(content, encoding="ascii")
        artifacts.publish(Path(temporary), uri)
    try:
        if artifacts.reader(uri).read(PROBE_FILE) != content.encode():
            raise SourceError(
                f"What was written to the artifact destination {shown} reads back as something else.",
                next_step="Look at the store, and at what is between it and this machine.",
            )
    finally:
        _delete(uri, shown)
    return Finding(CHECK, "ok", f"A file was written to {shown}, read back and deleted.")


def _delete(uri: str, shown: str) -> None:
    try:
        get_artifact_repository(uri).delete_artifacts()
    except (MlflowException, OSError, NotImplementedError) as error:
        raise SourceError(
            f"The probe in the artifact destination {shown} cannot be deleted ({type(error).__name__}).",
            next_step=f"Let this process delete there, and remove what begins with {PROBE}.",
        ) from error


def _refuse_unwritable(folder: Path) -> None:
    """Refuse a folder that cannot be written, or that cannot be made where it is missing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise SourceError(
            f"The artifact destination {folder} cannot be written: {there} is no folder that this process "
            "may write to.",
            next_step="Let the registry's process write there, or name another --artifacts-destination.",
        )


def _shown(destination: str) -> str:
    return shown_uri(destination) if "://" in destination else destination
