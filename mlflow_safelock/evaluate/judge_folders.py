"""The folders that judges are loaded from: a copy of one's own, and what tells one from others."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from mlflow_safelock.provenance import LocalArtifacts

BYTECODE = "__pycache__"

REGISTERED_META = "registered_model_meta"
"""File that MLflow writes into its downloads of registered models: it is no part of them."""


def digest_of(folder: Path) -> str:
    """What tells a folder from others, 16 hexadecimal digits: every byte of every file counts."""
    digest = hashlib.sha256()
    for file in LocalArtifacts(folder).files():
        with (folder / file.path).open("rb") as stream:
            contents = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(json.dumps([file.path, file.size, contents]).encode() + b"\n")
    return digest.hexdigest()[:16]


def copy_of(uri: str, place: Path) -> Path:
    """Copy what is at a URI of MLflow into a folder, without bytecode and what MLflow adds to downloads.

    Returns:
        Where in the folder it is.
    """
    from mlflow.tracking.artifact_utils import _download_artifact_from_uri
    from mlflow.utils.file_utils import local_file_uri_to_path

    if uri.startswith("file:"):
        # MLflow would follow a link to a folder above it without end.
        copy = _copied(Path(local_file_uri_to_path(uri)), place)
    else:
        copy = Path(_download_artifact_from_uri(artifact_uri=uri, output_path=str(place)))
    (copy / REGISTERED_META).unlink(missing_ok=True)
    # It may be older than the code beside it, which Python need not notice.
    for bytecode in list(copy.rglob(BYTECODE)):
        if bytecode.is_dir():
            shutil.rmtree(bytecode)
    return copy


def _copied(folder: Path, place: Path) -> Path:
    for file in LocalArtifacts(folder).files():
        target = place / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file.path, target)
    return place
