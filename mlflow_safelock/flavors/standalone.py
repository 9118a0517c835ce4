"""The standalone carrier: a complete MLflow model whose weights hold the lock's biases.

It keeps the fine-tune's own flavors, signature, input example and environment, so ``mlflow.transformers``,
stock ``transformers`` and vLLM load it, locked, without this package. Files of weights that do not change
are shared with the source; the receipt lies beside them, and what it takes to undo it.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from mlflow.models.model import MLMODEL_FILE_NAME

from mlflow_safelock.apply import save_locked_checkpoint
from mlflow_safelock.apply.checkpoint import unlock_checkpoint
from mlflow_safelock.apply.checkpoint.folder import written_aside
from mlflow_safelock.apply.checkpoint.progress import Progress, silent
from mlflow_safelock.apply.checkpoint.sharing import own_file, way_of
from mlflow_safelock.apply.checkpoint.structure import structure_in_words
from mlflow_safelock.apply.checkpoint.writing import WrittenFile
from mlflow_safelock.errors import SourceError, UnreachableError, VerificationError
from mlflow_safelock.flavors.overlay import FLAVOR_NAME, RECEIPT_FILE, foreign_loader, read_mlmodel
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import (
    ADDED_BY_CLIENTS,
    RECEIPT_SIGNATURE_FILE,
    ArtifactReader,
    FileFingerprint,
    LocalArtifacts,
    LockReference,
    Promotion,
    Receipt,
    ReceiptPredicate,
    SourceFingerprint,
    SourceReference,
    check_every_byte,
    check_fingerprint,
    check_receipt_signature,
    configured_signer,
    read_whole,
    sign_receipt,
    take_fingerprint,
    tool_versions,
)

WEIGHTS_FOLDER = "model"

SOURCE_MLMODEL_FILE = "MLmodel.source"
"""The fine-tune's own MLmodel file, for undoing the lock."""

Patches = tuple[tuple[int, bytes], ...]
"""Places in a file of the source, and the bytes that the locked model has there."""


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights of a standalone model: one of the source, as it is or with other biases.

    Attributes:
        path: Path in the standalone model.
        origin: Path in the source.
        patches: What differs; nothing where the file is shared.
        sharing: How it came there, in words.
    """

    path: str
    origin: str
    patches: Patches
    sharing: str

    def locked(self, start: int, data: bytes) -> bytes:
        """Bytes of the source from ``start`` on, as the locked model has them."""
        changed = bytearray(data)
        for begin, new in self.patches:
            first, last = max(begin, start), min(begin + len(new), start + len(data))
            if first < last:
                changed[first - start : last - start] = new[first - begin : last - begin]
        return bytes(changed)


@dataclass(frozen=True)
class Standalone:
    """A standalone model that was written.

    Attributes:
        receipt: What it states.
        weights: Its files of weights, but for the one that the lock added.
        check: How it was confirmed, in words.
        bias_error: What rounding the biases to the dtype of the weights costs, relative to their length.
    """

    receipt: Receipt
    weights: tuple[WeightsFile, ...]
    check: str
    bias_error: float


def write_standalone(
    folder: Path,
    source: Path,
    reader: ArtifactReader,
    source_uri: str,
    lock: SafetyLock,
    lock_reference: LockReference,
    alpha: float,
    promotion: Promotion | None,
    *,
    fingerprint: SourceFingerprint | None = None,
    complete: bool = True,
    progress: Progress = silent,
) -> Standalone:
    """Write the standalone model of a fine-tune into an empty folder.

    Args:
        folder: Existing, empty folder; on the file system of ``source`` it costs almost nothing.
        source: The fine-tune's artifacts, an MLflow model folder with merged weights.
        reader: The same artifacts where they really lie, for the fingerprint.
        source_uri: Where they are registered.
        lock: The lock.
        lock_reference: Where the lock comes from.
        alpha: Strength.
        promotion: On whose behalf; ``None`` for one written by hand.
        fingerprint: The source's, where it was measured before; otherwise it is taken now.
        complete: Whether ``source`` is whole. Where only the parts are there that the biases need, the model
            cannot be loaded for comparison, and its structure is checked instead; whoever puts the files of
            weights in their place compares them by the receipt (``weights_by_receipt``).
        progress: Is told how many bytes of the weights are in their place, and of how many.

    Raises:
        ApplyError: The lock does not go onto it, or no checkpoint of its architecture can hold the biases.
        CheckpointError: It cannot be read or written, or could not be confirmed.
        LockWithoutEffectError: Too little of the lock's push arrives in it; nothing was written.
        SourceError: It is not a model of ``mlflow.transformers``.
    """
    fingerprint = fingerprint or take_fingerprint(reader)
    described = read_mlmodel(LocalArtifacts(source))
    flavor = described["flavors"].get("transformers")
    if not isinstance(flavor, dict) or not isinstance(flavor.get("model_binary"), str):
        raise SourceError(
            f"The fine-tune at {source_uri} was not logged by mlflow.transformers with its weights.",
            next_step="Log it with mlflow.transformers.log_model.",
        )
    weights = source / flavor["model_binary"]
    beside = _files_beside(source, weights)
    _refuse_other_ways(described["flavors"], beside, source_uri)
    report = save_locked_checkpoint(
        source,
        folder / WEIGHTS_FOLDER,
        lock,
        alpha,
        verify="auto" if complete else "structure",
        progress=progress,
        require_effect=True,
    )
    check = report.check if complete else structure_in_words(COPIED_ELSEWHERE)
    files_of_weights = tuple(
        WeightsFile(
            path=f"{WEIGHTS_FOLDER}/{file.name}",
            origin=f"{flavor['model_binary']}/{file.source}",
            patches=_patches(folder / WEIGHTS_FOLDER / file.name, file),
            sharing=file.sharing,
        )
        for file in report.weights
    )
    for inside in beside:
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        own_file(source / inside, folder / inside)  # never over something: it is what was confirmed
    _describe(folder, described, lock, alpha)
    shutil.copyfile(source / MLMODEL_FILE_NAME, folder / SOURCE_MLMODEL_FILE)
    own = LocalArtifacts(folder)
    from_source = {file.path for file in files_of_weights}
    files = {
        file.path: hashlib.sha256(own.read(file.path)).hexdigest()
        for file in own.files()
        if file.path not in from_source
    }
    receipt = Receipt.about(
        ReceiptPredicate(
            source=SourceReference(uri=source_uri, fingerprint=fingerprint),
            lock=lock_reference,
            alpha=float(alpha),
            carrier="standalone",
            promotion=promotion,
            files=files,
            shared={file.path: file.origin for file in files_of_weights if not file.patches},
            patched=tuple(
                _patched_fingerprint(file, fingerprint, reader) for file in files_of_weights if file.patches
            ),
            check=check,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tools=tool_versions(),
        )
    )
    (folder / RECEIPT_FILE).write_bytes(receipt.to_bytes())
    sign_receipt(receipt, folder, configured_signer())
    return Standalone(receipt, files_of_weights, check, report.bias_error)


def _files_beside(source: Path, weights: Path) -> tuple[str, ...]:
    """What of a fine-tune goes into the locked model as it is, beside the folder of weights."""
    left_out = {MLMODEL_FILE_NAME, *ADDED_BY_CLIENTS}
    paths = (path for path in source.rglob("*") if path.is_file() and not path.is_relative_to(weights))
    return tuple(sorted({path.relative_to(source).as_posix() for path in paths} - left_out))


def _refuse_other_ways(flavors: dict[str, Any], beside: tuple[str, ...], source_uri: str) -> None:
    """Refuse a fine-tune of which more than the locked weights would be served."""
    others = sorted(flavors.keys() - {"transformers", "python_function"})
    if others:
        raise SourceError(
            f"The fine-tune at {source_uri} has the flavor {others[0]!r} too, which would serve it unlocked.",
            next_step="Log it with mlflow.transformers.log_model alone, or promote it as an overlay.",
        )
    loader = foreign_loader(flavors)
    if loader is not None:
        raise SourceError(
            f"The fine-tune at {source_uri} is loaded by {loader!r}, which may load anything.",
            next_step="Log it with mlflow.transformers.log_model.",
        )
    if any(flavor.get("code") for flavor in flavors.values() if isinstance(flavor, dict)):
        raise SourceError(
            f"The fine-tune at {source_uri} was logged with code (code_paths), which MLflow runs before it "
            "loads a model, and which may do anything.",
            next_step="Log it without, or promote it as an overlay, which leaves that code out.",
        )
    own = {SOURCE_MLMODEL_FILE, RECEIPT_FILE, RECEIPT_SIGNATURE_FILE}
    taken = [path for path in beside if path in own or path.startswith(f"{WEIGHTS_FOLDER}/")]
    if taken:
        raise SourceError(
            f"The fine-tune at {source_uri} has a file {taken[0]!r}, where the locked model has its own.",
            next_step="Log it again without that file.",
        )


def is_standalone(described: dict[str, Any]) -> bool:
    """Whether an MLmodel file is one of a standalone model."""
    flavor = described["flavors"].get(FLAVOR_NAME)
    return isinstance(flavor, dict) and flavor.get("carrier") == "standalone"


def is_complete(reader: ArtifactReader) -> bool:
    """Whether a model is there: its MLmodel file is written last, so without one a run goes on or ended.

    Raises:
        UnreachableError: The store does not answer now.
    """
    try:
        return MLMODEL_FILE_NAME in {file.path for file in reader.files()}
    except UnreachableError:
        raise
    except SourceError:
        return False


def read_standalone(reader: ArtifactReader) -> Receipt:
    """Read the receipt of a standalone model and compare its files with it.

    Files that the lock's writing made are compared whole, files of weights by blocks.

    Raises:
        VerificationError: There is none, a file is missing, new or another one, or the receipt is not signed
            where that is asked for.
    """
    receipt = read_small_files_of_standalone(reader)
    check_receipt_signature(receipt, reader)
    _check_weights(receipt, reader)
    return receipt


def read_unsigned_standalone(reader: ArtifactReader) -> Receipt:
    """Do what ``read_standalone`` does, but for the receipt's signature.

    This is for whoever knows which receipt it has to be. Of a store that gives whole files only, nothing is
    read of files of weights, of which names and sizes are compared.

    Raises:
        VerificationError: There is no receipt, or a file is missing, new or another one.
    """
    receipt = read_small_files_of_standalone(reader)
    if reader.reads_parts:
        _check_weights(receipt, reader)
    return receipt


def _check_weights(receipt: Receipt, reader: ArtifactReader) -> None:
    weights = weights_by_receipt(receipt)
    check_fingerprint(weights, reader, others={file.path for file in reader.files()})


def read_small_files_of_standalone(reader: ArtifactReader) -> Receipt:
    """Do what ``read_standalone`` does, but compare of files of weights their names and sizes alone.

    The receipt's signature is not looked at: this is for whoever knows which receipt it has to be.

    Raises:
        VerificationError: There is no receipt, or a file is missing, new or another one.
    """
    try:
        receipt = Receipt.parse(reader.read(RECEIPT_FILE), origin=f"{reader.location}/{RECEIPT_FILE}")
    except SourceError as error:
        raise VerificationError(f"There is no receipt at {reader.location}.", next_step=_AGAIN) from error
    stated = receipt.predicate
    weights = weights_by_receipt(receipt)
    expected = {*stated.files, *(file.path for file in weights.files), RECEIPT_FILE}
    sizes = {file.path: file.size for file in reader.files()}
    for path in sorted(expected ^ (sizes.keys() - ADDED_BY_CLIENTS - {RECEIPT_SIGNATURE_FILE})):
        what = "is missing" if path in expected else "is not in its receipt"
        raise VerificationError(
            f"The locked model's file {path!r} at {reader.location} {what}.", next_step=_AGAIN
        )
    for path, sha256 in stated.files.items():
        if hashlib.sha256(reader.read(path)).hexdigest() != sha256:
            raise VerificationError(
                f"The locked model's file {path!r} at {reader.location} is not the one of its receipt.",
                next_step=_AGAIN,
            )
    for file in weights.files:
        if sizes[file.path] != file.size:
            raise VerificationError(
                f"The locked model's file {file.path!r} at {reader.location} has {sizes[file.path]} bytes, "
                f"and {file.size} by its receipt.",
                next_step=_AGAIN,
            )
    return receipt


def read_all_of_standalone(reader: ArtifactReader) -> Receipt:
    """Do what ``read_standalone`` does, and compare every byte where the fine-tune was measured before.

    Raises:
        VerificationError: Something is not as the receipt says.
    """
    receipt = read_standalone(reader)
    check_every_byte(weights_by_receipt(receipt), reader, others={file.path for file in reader.files()})
    return receipt


@dataclass(frozen=True)
class Unlocked:
    """An unlocked MLflow model that was written.

    Attributes:
        folder: Where it is.
        files: Paths of its files; each was compared with the receipt's fingerprint of the fine-tune.
        missing: Files of the fine-tune that the locked model did not carry.
        lock: Digest of the lock that was undone.
        alpha: Its strength.
    """

    folder: Path
    files: tuple[str, ...]
    missing: tuple[str, ...]
    lock: str
    alpha: float


def unlock_standalone(locked: Path, destination: Path, *, sharing: str = "copy") -> Unlocked:
    """Write the fine-tune that a standalone model was made of, as it was logged.

    Args:
        locked: The standalone model's folder.
        destination: The folder to write. It must not exist; its parent must.
        sharing: ``copy`` for files of weights that are independent of the locked model's, or ``link`` to
            share them where the filesystem can.

    Raises:
        CheckpointError: A file is not the one that was written, or the copy cannot be written.
        VerificationError: The locked model is not as its receipt says, or the result not the fine-tune.
    """
    receipt = read_all_of_standalone(LocalArtifacts(locked))
    expected = {file.path: file for file in receipt.predicate.source.fingerprint.files}
    described = yaml.safe_load((locked / SOURCE_MLMODEL_FILE).read_text(encoding="utf-8"))
    binary = described["flavors"]["transformers"]["model_binary"]
    with written_aside(destination) as beside:
        weights = beside / binary
        if not weights.resolve().is_relative_to(beside.resolve()):
            raise VerificationError(f"{locked / SOURCE_MLMODEL_FILE} leads out of its folder: {binary!r}.")
        weights.parent.mkdir(parents=True, exist_ok=True)
        undone = unlock_checkpoint(locked / WEIGHTS_FOLDER, weights, sharing=sharing)
        for path in files_below(beside) - expected.keys():
            (beside / path).unlink()  # what came from beside the weights, and is put there below
        shutil.copyfile(locked / SOURCE_MLMODEL_FILE, beside / MLMODEL_FILE_NAME)
        for path in (files_below(locked) & expected.keys()) - files_below(beside):
            (beside / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(locked / path, beside / path)
        files = files_below(beside)
        found = SourceFingerprint(files=tuple(expected[path] for path in sorted(files)))
        check_every_byte(found, LocalArtifacts(beside))
    missing = expected.keys() - files
    return Unlocked(destination, tuple(sorted(files)), tuple(sorted(missing)), undone.lock, undone.alpha)


def export_standalone(
    locked: Path, destination: Path, *, sharing: str = "copy"
) -> tuple[Receipt, dict[str, str]]:
    """Write the folder that stock software loads, out of a standalone model that is as its receipt says.

    Args:
        locked: The standalone model's folder.
        destination: The folder to write. It must not exist; its parent must.
        sharing: ``copy`` for files of weights that are independent of the locked model's, or ``link`` to
            share them where the filesystem can.

    Returns:
        The receipt, and how each file of weights came into the folder.

    Raises:
        CheckpointError: The folder cannot be written.
        VerificationError: The locked model is not as its receipt says.
    """
    share = way_of(sharing)
    receipt = read_all_of_standalone(LocalArtifacts(locked))
    weights = {file.path for file in weights_by_receipt(receipt).files}
    ways: dict[str, str] = {}
    with written_aside(destination) as beside:
        for path in sorted(files_below(locked / WEIGHTS_FOLDER)):
            is_weights = f"{WEIGHTS_FOLDER}/{path}" in weights
            (beside / path).parent.mkdir(parents=True, exist_ok=True)
            how = (share if is_weights else own_file)(locked / WEIGHTS_FOLDER / path, beside / path)
            if is_weights:
                ways[path] = how
    return receipt, ways


def files_below(folder: Path) -> set[str]:
    """Paths of the files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def weights_by_receipt(receipt: Receipt) -> SourceFingerprint:
    """What a receipt says of the files of weights that come from the source: sizes, and blocks of them.

    Raises:
        VerificationError: It names a file that the source does not have.
    """
    stated = receipt.predicate
    copies = stated.source.fingerprint.of_copies(stated.shared)
    return SourceFingerprint(files=(*copies.files, *stated.patched))


COPIED_ELSEWHERE = (
    "files of weights are copies that the store made, compared with the source's by size and by blocks drawn "
    "at random"
)
"""How files of weights were compared that never were on this machine."""


def _patches(locked: Path, file: WrittenFile) -> Patches:
    with locked.open("rb") as stream:
        patches = []
        for patch in file.patches:
            stream.seek(patch.begin)
            patches.append((patch.begin, stream.read(len(patch.before))))
    return tuple(patches)


def _patched_fingerprint(
    file: WeightsFile, source: SourceFingerprint, reader: ArtifactReader
) -> FileFingerprint:
    """The fingerprint of a file of the source with other biases: the same blocks, and the biases."""
    before = next(one for one in source.files if one.path == file.origin)
    spans = tuple(sorted({*before.spans, *((begin, len(new)) for begin, new in file.patches)}))
    state = hashlib.sha256()
    for (start, _), data in zip(spans, reader.read_many(file.origin, spans), strict=True):
        state.update(file.locked(start, data))
    whole = _whole_digest(file, before.size, reader) if before.whole is not None else None
    return FileFingerprint(
        path=file.path, size=before.size, spans=spans, sha256=state.hexdigest(), whole=whole
    )


def _whole_digest(file: WeightsFile, size: int, reader: ArtifactReader) -> str:
    state = hashlib.sha256()
    for (start, _), data in read_whole(reader, file.origin, size):
        state.update(file.locked(start, data))
    return state.hexdigest()


_AGAIN = "Write it again: safelock prepare."


def _describe(folder: Path, described: dict[str, Any], lock: SafetyLock, alpha: float) -> None:
    """Write the fine-tune's MLmodel file as it fits the locked weights."""
    config = yaml.safe_load((folder / WEIGHTS_FOLDER / "config.json").read_text(encoding="utf-8"))
    flavors = described["flavors"]
    flavors["transformers"]["model_binary"] = WEIGHTS_FOLDER
    if config.get("architectures"):
        # A Mistral or Qwen2 is written down as a Llama, and MLflow loads the class that this names.
        flavors["transformers"]["pipeline_model_type"] = config["architectures"][0]
    flavors[FLAVOR_NAME] = {
        "base_model": lock.base_model,
        "lock_digest": lock.digest,
        "alpha": float(alpha),
        "carrier": "standalone",
    }
    (folder / MLMODEL_FILE_NAME).write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
