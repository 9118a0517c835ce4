"""A standalone model beside the fine-tune that it shares its weights with, wherever that lies.

On one file system the weights are shared by links. On S3 the store copies them itself: of the fine-tune only
what the lock's biases are computed from passes through this process, the output projections of the locked
layers, and samples, in a local folder whose files of weights have holes in place of all else.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from uuid import uuid4

from mlflow.models.model import MLMODEL_FILE_NAME

from mlflow_safelock.apply.architectures import Architecture, architecture_of
from mlflow_safelock.apply.checkpoint.layout import is_carried_name
from mlflow_safelock.apply.checkpoint.progress import Meter, Progress, silent
from mlflow_safelock.apply.checkpoint.sample import sampled_spans
from mlflow_safelock.errors import SourceError, VerificationError
from mlflow_safelock.flavors.overlay import read_mlmodel
from mlflow_safelock.flavors.standalone import Standalone, weights_by_receipt
from mlflow_safelock.gate.failpoints import reach
from mlflow_safelock.gate.ports import Writer
from mlflow_safelock.gate.stored_weights import INDEX_FILE, read_stored_weights
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import (
    ArtifactFile,
    ArtifactReader,
    Receipt,
    Span,
    check_fingerprint,
    read_header,
)
from mlflow_safelock.registry.ranges import MAX_REQUEST_BYTES
from mlflow_safelock.registry.s3 import S3Artifacts
from mlflow_safelock.registry.s3_copies import S3Copies
from mlflow_safelock.registry.s3_publication import S3Publication

HELD_BYTES = 64 << 20
"""How much of a large file is held in memory at once."""


def derive_locally(source: Path, destination: Path, write: Writer) -> Standalone:
    """Write aside and rename, so that nobody ever reads a half-written folder there."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = destination.with_name(f".{destination.name}-{uuid4().hex}")
    try:
        aside.mkdir()
        written = write(source, aside, True)
        reach("standalone-aside")
        try:
            aside.rename(destination)
        except OSError:
            if not destination.is_dir():
                raise
            if not (destination / MLMODEL_FILE_NAME).exists():
                # What is written here appears whole: this is somebody else's, or somebody took parts of it.
                shutil.rmtree(destination)
                aside.rename(destination)
        return written
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds something, as it should
            destination.parent.rmdir()


def derive_on_s3(
    source: S3Artifacts, destination: S3Artifacts, lock: SafetyLock, write: Writer, progress: Progress
) -> Standalone:
    """Let the store copy the weights, and upload the rest; copies of a run that was cut off are kept.

    Raises:
        SourceError: Something cannot be read, copied or written, or a copy is not what its source is.
    """
    with TemporaryDirectory(prefix="safelock-") as temporary:
        mirror, folder = Path(temporary) / "source", Path(temporary) / "locked"
        folder.mkdir()
        mirror_what_a_lock_needs(source, lock, mirror, progress)
        written = write(mirror, folder, False)
        with S3Publication(destination) as publication:
            S3Copies(source, destination).make(written.weights, progress)
            copied = {file.path for file in written.weights}
            for file in _files_in(folder):
                path = file.relative_to(folder).as_posix()
                if path not in copied:
                    publication.put_file(path, file)
            # Before the MLmodel file, which makes the folder a model, is written.
            _compare_copies(written.receipt, S3Artifacts(destination.uri, destination.client))
    return replace(
        written, weights=tuple(replace(file, sharing="copied by the store") for file in written.weights)
    )


def derive_by_download(
    source: ArtifactReader, publish: Callable[[Path], None], write: Writer, progress: Progress
) -> Standalone:
    """Fetch the whole fine-tune, and upload the whole locked model."""
    with TemporaryDirectory(prefix="safelock-") as temporary:
        copy, folder = Path(temporary) / "source", Path(temporary) / "locked"
        folder.mkdir()
        meter = Meter("Fetching the fine-tune", sum(file.size for file in source.files()), progress)
        for file in source.files():
            _fetch(source, file, ((0, file.size),), copy / file.path, meter)
        written = write(copy, folder, True)
        publish(folder)
    return replace(
        written, weights=tuple(replace(file, sharing="fetched and uploaded") for file in written.weights)
    )


def mirror_what_a_lock_needs(
    reader: ArtifactReader, lock: SafetyLock, folder: Path, progress: Progress = silent
) -> None:
    """Make a local folder of the files of a fine-tune, with holes in place of what is not needed.

    Files that a locked model carries are whole; others in the folder of weights are nothing but holes. Of
    files of weights it has the header, the output projections of the locked layers, and what the digests are
    made of by which an undone lock is told from another model.

    Raises:
        SourceError: Something cannot be read, or it is not a model of ``mlflow.transformers``.
    """
    flavor = read_mlmodel(reader)["flavors"].get("transformers") or {}
    binary = str(flavor.get("model_binary"))
    config = json.loads(reader.read(f"{binary}/config.json"))
    locked = locked_projections(architecture_of(config), lock)
    stored = read_stored_weights(reader, binary)
    weights = {tensor.file for tensor in stored.tensors.values()} if stored is not None else set()
    wanted = {
        file: weights_spans(reader, file, locked)
        if file.path in weights
        else whole_or_nothing(file, PurePosixPath(binary))
        for file in reader.files()
    }
    meter = Meter(
        "Reading what the biases come from",
        sum(length for spans in wanted.values() for _, length in spans),
        progress,
    )
    for file, spans in wanted.items():
        _fetch(reader, file, spans, folder / file.path, meter)


def whole_or_nothing(file: ArtifactFile, weights: PurePosixPath) -> tuple[Span, ...]:
    """The parts of a file that holds no weights; ``weights`` is the folder of those."""
    path = PurePosixPath(file.path)
    is_needed = not path.is_relative_to(weights) or is_carried_name(path.name) or path.name == INDEX_FILE
    return ((0, file.size),) if is_needed or path.name in ("config.json", "README.md") else ()


def weights_spans(reader: ArtifactReader, file: ArtifactFile, locked: re.Pattern[str]) -> tuple[Span, ...]:
    """The parts of a file of weights that are needed; ``locked`` finds the tensors that biases need."""
    header = read_header(reader, file.path, file.size)
    projections = sorted(span for name, span in header.tensors.items() if locked.search(name))
    return ((0, header.size), *projections, *sampled_spans(file.size))


def _compare_copies(receipt: Receipt, copies: S3Artifacts) -> None:
    """Compare files of weights that the store copied with what the receipt says of them."""
    others = {file.path for file in copies.files()}
    try:
        check_fingerprint(weights_by_receipt(receipt), copies, others=others)
    except VerificationError as error:
        raise SourceError(
            f"What the store copied to {copies.location} is not what the fine-tune is: {error.cause}",
            next_step=f"Delete {copies.location}, and do it again.",
        ) from error


def locked_projections(architecture: Architecture, lock: SafetyLock) -> re.Pattern[str]:
    """Finds the tensors of the output projections of locked layers by name."""
    layers = "|".join(map(str, lock.layers))
    container = re.escape(architecture.layers.rpartition(".")[2])
    return re.compile(rf"(?:^|\.){container}\.(?:{layers})\.{re.escape(architecture.output_projection)}\.")


def _fetch(
    reader: ArtifactReader, file: ArtifactFile, spans: tuple[Span, ...], target: Path, meter: Meter
) -> None:
    """Write parts of a file where they belong in a local one of its size; the rest are holes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as local:
        local.truncate(file.size)
        for batch in _batches(spans):
            for (start, length), data in zip(batch, reader.read_many(file.path, batch), strict=True):
                if len(data) != length:
                    raise SourceError(
                        f"The file {file.path!r} at {reader.location} ends before {start + length}."
                    )
                local.seek(start)
                local.write(data)
                meter.add(length)


def _batches(spans: tuple[Span, ...]) -> Iterator[list[Span]]:
    """The spans in pieces that are requested at once, as many as are held in memory."""
    batch: list[Span] = []
    held = 0
    for start, length in spans:
        for offset in range(0, length, MAX_REQUEST_BYTES):
            piece = start + offset, min(MAX_REQUEST_BYTES, length - offset)
            if held + piece[1] > HELD_BYTES:
                yield batch
                batch, held = [], 0
            batch.append(piece)
            held += piece[1]
    if batch:
        yield batch


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
