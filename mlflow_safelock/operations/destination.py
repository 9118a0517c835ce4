"""The artifact destination: whether it can be reached, and whether it can be written."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlparse
from uuid import uuid4

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from mlflow_safelock.errors import SourceError
from mlflow_safelock.operations.findings import Finding
from mlflow_safelock.registry.artifacts import DESTINATION_VARIABLE
from mlflow_safelock.registry.s3 import SCHEME, bucket_owner, s3_client, upload_settings
from mlflow_safelock.registry.s3_errors import s3_errors
from mlflow_safelock.registry.schemes import shown_uri

CHECK = "artifacts"

ROOT_VARIABLE = "_MLFLOW_SERVER_ARTIFACT_ROOT"
"""Environment variable in which ``mlflow server`` tells its workers where new experiments put artifacts."""

SERVES_VARIABLE = "_MLFLOW_SERVER_SERVE_ARTIFACTS"
"""Environment variable in which it tells them whether clients reach artifacts through the server."""

ANSWERS_WITHIN = 5.0
"""Seconds that a store has for each answer."""


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


def probe(destination: str) -> Finding:
    """Whether the destination answers, takes a small file, gives it back and deletes it again.

    Raises:
        SourceError: It does not; what is left there, if anything is, is named.
    """
    reach(destination)
    shown, name, data = _shown(destination), f"safelock-doctor-{uuid4().hex}.txt", b"safelock doctor"
    if is_local_uri(destination, is_tracking_or_registry_uri=False):
        given_back = _probe_folder(Path(local_file_uri_to_path(destination)), name, data)
    elif urlparse(destination).scheme == SCHEME:
        given_back = _probe_s3(destination, name, data)
    else:
        given_back = _probe_repository(destination, name, data)
    if given_back != data:
        raise SourceError(
            f"The artifact destination {shown} did not give back what was written there.",
            next_step="Look at the store, and at a proxy or cache in front of it.",
        )
    return Finding(CHECK, "ok", f"The artifact destination {shown} takes, gives back and deletes a file.")


def _probe_folder(folder: Path, name: str, data: bytes) -> bytes:
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / name).write_bytes(data)
            return (folder / name).read_bytes()
        finally:
            (folder / name).unlink(missing_ok=True)
            for made in missing:
                made.rmdir()
    except OSError as error:
        raise SourceError(
            f"The artifact destination {folder} cannot be written: {error}.",
            next_step="Let the registry's process write there, and make room.",
        ) from error


def _probe_s3(destination: str, name: str, data: bytes) -> bytes:
    parsed, client = urlparse(destination), s3_client(ANSWERS_WITHIN)
    place = {
        "Bucket": parsed.netloc,
        "Key": posixpath.join(parsed.path.strip("/"), name),
        **bucket_owner(),
    }
    with s3_errors(f"The file {name!r} that was to be written to {_shown(destination)}"):
        client.put_object(**place, Body=data, **upload_settings())
        try:
            given_back: bytes = client.get_object(**place)["Body"].read()
        finally:
            client.delete_object(**place)
        return given_back


def _probe_repository(destination: str, name: str, data: bytes) -> bytes:
    try:
        repository = get_artifact_repository(destination)
        with TemporaryDirectory(prefix="safelock-") as temporary:
            (Path(temporary) / name).write_bytes(data)
            repository.log_artifact(str(Path(temporary) / name))
            try:
                return Path(repository.download_artifacts(name)).read_bytes()
            finally:
                repository.delete_artifacts(name)
    except Exception as error:  # each kind of store raises its own
        raise SourceError(
            f"The artifact destination {_shown(destination)} cannot be written, or the file {name!r} not be "
            f"deleted there again ({type(error).__name__}).",
            next_step="Let the registry's process write, read and delete there.",
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
