"""A standalone model beside the fine-tune that it shares its weights with, wherever that lies.

On one file system the weights are shared by links. On S3 the store copies them itself: of the fine-tune only
what the lock's biases are computed from passes through this process, the output projections of the locked
layers, in a local folder whose files of weights have holes in place of all else.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from mlflow_safelock.apply.architectures import Architecture, architecture_of
from mlflow_safelock.errors import SourceError
from mlflow_safelock.flavors.overlay import read_mlmodel
from mlflow_safelock.flavors.standalone import Standalone
from mlflow_safelock.gate.ports import Writer
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import ArtifactFile, ArtifactReader, Span, read_header
from mlflow_safelock.registry.s3 import S3Artifacts
from mlflow_safelock.registry.s3_publication import S3Publication

WEIGHTS = ".safetensors"

CHUNK_BYTES = 64 << 20
"""How much of a large file is held in memory at once."""


def derive_locally(source: Path, destination: Path, write: Writer) -> Standalone:
    """Write aside and rename, so that nobody ever reads a half-written folder there."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = destination.with_name(f".{destination.name}-{uuid4().hex}")
    aside.mkdir()
    try:
        written = write(source, aside, True)
        try:
            aside.rename(destination)
        except OSError:
            if not destination.is_dir():
                raise
        return written
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def derive_on_s3(
    source: S3Artifacts, destination: S3Artifacts, lock: SafetyLock, write: Writer
) -> Standalone:
    """Let the store copy what does not change, and upload the rest."""
    with TemporaryDirectory(prefix="safelock-") as temporary:
        mirror, folder = Path(temporary) / "source", Path(temporary) / "locked"
        folder.mkdir()
        mirror_what_a_lock_needs(source, lock, mirror)
        written = write(mirror, folder, False)
        with S3Publication(destination) as publication:
            for path, origin in written.shared.items():
                publication.copy_from(source, origin, path)
            for file in _files_in(folder):
                path = file.relative_to(folder).as_posix()
                if path not in written.shared:
                    publication.put_file(path, file)
    return written


def derive_by_download(source: ArtifactReader, publish: Callable[[Path], None], write: Writer) -> Standalone:
    """Fetch the whole fine-tune, and upload the whole locked model."""
    with TemporaryDirectory(prefix="safelock-") as temporary:
        copy, folder = Path(temporary) / "source", Path(temporary) / "locked"
        folder.mkdir()
        for file in source.files():
            target = copy / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch(source, file, ((0, file.size),), target)
        written = write(copy, folder, True)
        publish(folder)
    return written


def mirror_what_a_lock_needs(reader: ArtifactReader, lock: SafetyLock, folder: Path) -> None:
    """Make a local folder of the files of a fine-tune, with holes in place of weights that no bias needs.

    Files other than weights are whole. Where the fine-tune has output biases of its own, which the lock
    changes, the files that hold those are whole, too, since they are written anew.

    Raises:
        SourceError: Something cannot be read, or it is not a model of ``mlflow.transformers``.
    """
    flavor = read_mlmodel(reader)["flavors"].get("transformers") or {}
    config = json.loads(reader.read(f"{flavor.get('model_binary')}/config.json"))
    locked = _locked_projections(architecture_of(config), lock)
    for file in reader.files():
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not file.path.endswith(WEIGHTS):
            _fetch(reader, file, ((0, file.size),), target)
            continue
        header = read_header(reader, file.path)
        wanted = {name: span for name, span in header.tensors.items() if locked.search(name)}
        if any(name.endswith(".bias") for name in wanted):
            _fetch(reader, file, ((0, file.size),), target)
        else:
            _fetch(reader, file, ((0, header.size), *sorted(wanted.values())), target)


def _locked_projections(architecture: Architecture, lock: SafetyLock) -> re.Pattern[str]:
    """Finds the tensors of the output projections of locked layers by name."""
    layers = "|".join(map(str, lock.layers))
    container = re.escape(architecture.layers.rpartition(".")[2])
    return re.compile(rf"(?:^|\.){container}\.(?:{layers})\.{re.escape(architecture.output_projection)}\.")


def _fetch(reader: ArtifactReader, file: ArtifactFile, spans: tuple[Span, ...], target: Path) -> None:
    """Write parts of a file where they belong in a local one of its size; the rest are holes."""
    with target.open("wb") as local:
        local.truncate(file.size)
        for start, length in _in_chunks(spans):
            data = reader.read(file.path, start, length)
            if len(data) != length:
                raise SourceError(
                    f"The file {file.path!r} at {reader.location} ends before {start + length}."
                )
            local.seek(start)
            local.write(data)


def _in_chunks(spans: tuple[Span, ...]) -> Iterator[Span]:
    for start, length in spans:
        for offset in range(0, length, CHUNK_BYTES):
            yield start + offset, min(CHUNK_BYTES, length - offset)


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
