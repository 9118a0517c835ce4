"""The standalone carrier: a complete MLflow model whose weights hold the lock's biases.

It keeps the fine-tune's own flavors, signature, input example and environment, so ``mlflow.transformers``,
stock ``transformers`` and vLLM load it, locked, without this package. Files of weights that do not change
are shared with the source; the receipt lies beside them.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from mlflow.models.model import MLMODEL_FILE_NAME

from mlflow_safelock.apply import save_locked_checkpoint
from mlflow_safelock.errors import SourceError, VerificationError
from mlflow_safelock.flavors.overlay import FLAVOR_NAME, RECEIPT_FILE, read_mlmodel
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import (
    ADDED_BY_CLIENTS,
    ArtifactReader,
    LocalArtifacts,
    LockReference,
    Promotion,
    Receipt,
    ReceiptPredicate,
    SourceReference,
    check_fingerprint,
    take_fingerprint,
)

WEIGHTS_FOLDER = "model"


@dataclass(frozen=True)
class Standalone:
    """A standalone model that was written.

    Attributes:
        receipt: What it states.
        shared: Files of it that are, byte for byte, a file of the source: path there by path here.
        check: How it was confirmed, in words.
    """

    receipt: Receipt
    shared: dict[str, str]
    check: str


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
    complete: bool = True,
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
        complete: Whether ``source`` is whole. Where only the parts are there that the biases need, the model
            cannot be loaded for comparison, and its structure is checked instead.

    Raises:
        ApplyError: The lock does not go onto it, or no checkpoint of its architecture can hold the biases.
        CheckpointError: It cannot be read or written, or could not be confirmed.
        SourceError: It is not a model of ``mlflow.transformers``.
    """
    fingerprint = take_fingerprint(reader)
    described = read_mlmodel(LocalArtifacts(source))
    flavor = described["flavors"].get("transformers")
    if not isinstance(flavor, dict) or not isinstance(flavor.get("model_binary"), str):
        raise SourceError(
            f"The fine-tune at {source_uri} was not logged by mlflow.transformers with its weights.",
            next_step="Log it with mlflow.transformers.log_model.",
        )
    weights = source / flavor["model_binary"]
    report = save_locked_checkpoint(
        source, folder / WEIGHTS_FOLDER, lock, alpha, verify="auto" if complete else "structure"
    )
    shared = {
        f"{WEIGHTS_FOLDER}/{file.name}": f"{flavor['model_binary']}/{file.source}"
        for file in report.weights
        if not file.patches
    }
    for path in source.rglob("*"):
        inside = path.relative_to(source)
        left_out = {MLMODEL_FILE_NAME, *ADDED_BY_CLIENTS}
        if path.is_file() and not path.is_relative_to(weights) and inside.as_posix() not in left_out:
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / inside)
    _describe(folder, described, lock, alpha)
    own = LocalArtifacts(folder)
    files = {
        file.path: hashlib.sha256(own.read(file.path)).hexdigest()
        for file in own.files()
        if file.path not in shared
    }
    receipt = Receipt.about(
        ReceiptPredicate(
            source=SourceReference(uri=source_uri, fingerprint=fingerprint),
            lock=lock_reference,
            alpha=float(alpha),
            carrier="standalone",
            promotion=promotion,
            files=files,
            shared=shared,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tools={name: version(name) for name in ("mlflow-safelock", "mlflow", "transformers", "torch")},
        )
    )
    (folder / RECEIPT_FILE).write_bytes(receipt.to_bytes())
    return Standalone(receipt, shared, report.check)


def read_standalone(reader: ArtifactReader) -> Receipt:
    """Read the receipt of a standalone model and compare its files with it.

    Files that the lock's writing made are compared whole. Those shared with the source are compared by the
    blocks of the source's fingerprint.

    Raises:
        VerificationError: There is none, or a file is missing, new or another one.
    """
    try:
        receipt = Receipt.parse(reader.read(RECEIPT_FILE), origin=f"{reader.location}/{RECEIPT_FILE}")
    except SourceError as error:
        raise VerificationError(f"There is no receipt at {reader.location}.", next_step=_AGAIN) from error
    stated = receipt.predicate
    expected = {*stated.files, *stated.shared, RECEIPT_FILE}
    found = {file.path for file in reader.files()} - ADDED_BY_CLIENTS
    for path in sorted(expected ^ found):
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
    copies = stated.source.fingerprint.of_copies(stated.shared)
    check_fingerprint(copies, reader, others=expected)
    return receipt


_AGAIN = "Write it again: safelock prepare."


def _describe(folder: Path, described: dict[str, Any], lock: SafetyLock, alpha: float) -> None:
    """Write the fine-tune's MLmodel file as it fits the locked weights."""
    config = yaml.safe_load((folder / WEIGHTS_FOLDER / "config.json").read_text(encoding="utf-8"))
    flavors = described["flavors"]
    # A Mistral or Qwen2 is written down as a Llama, and MLflow loads the class that this names.
    flavors["transformers"] |= {
        "model_binary": WEIGHTS_FOLDER,
        "pipeline_model_type": config["architectures"][0],
    }
    flavors[FLAVOR_NAME] = {
        "base_model": lock.base_model,
        "lock_digest": lock.digest,
        "alpha": float(alpha),
        "carrier": "standalone",
    }
    (folder / MLMODEL_FILE_NAME).write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
