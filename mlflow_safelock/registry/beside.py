"""The folders of locked models beside a fine-tune: which there are, and deleting one.

Only what is named as this package names such folders is ever listed, and only that is ever deleted.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse
from uuid import uuid4

from mlflow.exceptions import MlflowException
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from mlflow_safelock.errors import SourceError
from mlflow_safelock.gate.places import BESIDE, LOCKED_FOLDER
from mlflow_safelock.gate.ports import LockedFolder
from mlflow_safelock.registry.s3 import SCHEME, S3Artifacts, bucket_owner
from mlflow_safelock.registry.s3_errors import s3_errors

DELETED_AT_ONCE = 1000
"""Most objects that S3 deletes by one request."""


def found_folders(root: str, physical: str) -> tuple[LockedFolder, ...]:
    """The folders of locked models in ``root``, which lies at ``physical``; none where it is not there.

    Raises:
        SourceError: They cannot be listed.
    """
    sizes: dict[str, dict[str, int]] = {}
    for path, size in _listed(physical):
        name, _, file = path.partition("/")
        if file and LOCKED_FOLDER.fullmatch(name):
            sizes.setdefault(name, {})[file] = size
    return tuple(
        LockedFolder(f"{root}/{name}", sum(files.values()), len(files), _is_complete(name, files))
        for name, files in sorted(sizes.items())
    )


def _is_complete(name: str, files: Collection[str]) -> bool:
    return MLMODEL_FILE_NAME in files and not name.startswith(".")


def delete_folder(physical: str) -> None:
    """Delete the folder of a locked model.

    Raises:
        SourceError: It is not named as one, or cannot be deleted.
    """
    path = PurePosixPath(urlparse(physical).path)
    if not (LOCKED_FOLDER.fullmatch(path.name) and path.parent.name.endswith(BESIDE)) or ".." in path.parts:
        raise SourceError(f"{physical} is no folder of a locked model, and stays.")
    try:
        if is_local_uri(physical, is_tracking_or_registry_uri=False):
            _delete_locally(Path(local_file_uri_to_path(physical)))
        elif urlparse(physical).scheme == SCHEME:
            _delete_on_s3(S3Artifacts(physical))
        else:
            parent, _, name = physical.rpartition("/")
            get_artifact_repository(parent).delete_artifacts(name)
    except (OSError, MlflowException, NotImplementedError) as error:
        raise SourceError(
            f"The folder {physical} cannot be deleted: {error or type(error).__name__}.",
            next_step="Let this process delete beside the model's artifacts.",
        ) from error


def _listed(physical: str) -> Iterable[tuple[str, int]]:
    """Every file below a folder, with the bytes that are its own."""
    if is_local_uri(physical, is_tracking_or_registry_uri=False):
        return _listed_locally(Path(local_file_uri_to_path(physical)))
    if urlparse(physical).scheme == SCHEME:
        return _listed_on_s3(S3Artifacts(physical))
    return _listed_remotely(physical)


def _listed_locally(root: Path) -> Iterator[tuple[str, int]]:
    for folder, folders, files in os.walk(root):
        # A link to a folder is not followed; one among the names is not one of ours either.
        folders[:] = [name for name in folders if not Path(folder, name).is_symlink()]
        for name in files:
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # taken away meanwhile
                status = path.lstat()
                own = 0 if path.is_symlink() or status.st_nlink > 1 else status.st_size
                yield path.relative_to(root).as_posix(), own


def _listed_on_s3(root: S3Artifacts) -> Iterator[tuple[str, int]]:
    prefix = f"{root.key('').rstrip('/')}/"
    with s3_errors(f"The folder {root.uri}"):
        pages = root.client.get_paginator("list_objects_v2").paginate(
            Bucket=root.bucket, Prefix=prefix, **bucket_owner()
        )
        for page in pages:
            for entry in page.get("Contents", []):
                yield entry["Key"].removeprefix(prefix), int(entry["Size"])


def _listed_remotely(physical: str) -> Iterator[tuple[str, int]]:
    folders: list[str | None] = [None]
    try:
        repository = get_artifact_repository(physical)
        while folders:
            for entry in repository.list_artifacts(folders.pop()):
                if entry.is_dir:
                    folders.append(entry.path)
                else:
                    yield entry.path, int(entry.file_size or 0)
    except Exception as error:  # each kind of store raises its own
        raise SourceError(
            f"The artifacts at {physical} cannot be listed: {error}.",
            next_step="Look whether this process may list them.",
        ) from error


def _delete_locally(folder: Path) -> None:
    """Rename aside first, so that nobody ever reads half of a folder there."""
    if folder.is_symlink():
        raise SourceError(f"{folder} is a link, and stays.")
    aside = folder
    if not folder.name.startswith("."):
        aside = folder.with_name(f".{folder.name}-{uuid4().hex}")
        folder.rename(aside)
    shutil.rmtree(aside)


def _delete_on_s3(folder: S3Artifacts) -> None:
    """Delete the MLmodel file first, which makes a folder a model."""
    paths = sorted((path for path, _ in _listed_on_s3(folder)), key=lambda path: path != MLMODEL_FILE_NAME)
    keys = [posixpath.join(folder.key("").rstrip("/"), path) for path in paths]
    batches = [keys[:1]] + [
        keys[start : start + DELETED_AT_ONCE] for start in range(1, len(keys), DELETED_AT_ONCE)
    ]
    for batch in batches:
        objects: dict[str, Any] = {"Objects": [{"Key": key} for key in batch], "Quiet": True}
        with s3_errors(f"The folder {folder.uri}"):
            answer = folder.client.delete_objects(Bucket=folder.bucket, Delete=objects, **bucket_owner())
        for failed in answer.get("Errors", []):
            raise SourceError(f"The object {failed['Key']} cannot be deleted: {failed.get('Message')}.")
