"""What is measured: a loaded model, the lock that goes onto it, and where it came from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mlflow_safelock.errors import EvaluationError, LockMismatchError, SourceError, VerificationError
from mlflow_safelock.loading import (
    ONE_DEVICE,
    ModelLoading,
    fetch_mlflow_model,
    is_mlflow_model,
    load_language_model,
    load_lock_reference,
)
from mlflow_safelock.provenance import (
    LocalArtifacts,
    Receipt,
    SourceFingerprint,
    check_fingerprint,
    measure,
    take_fingerprint,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mlflow_safelock.lock import SafetyLock


@dataclass(frozen=True)
class RegisteredVersion:
    """A version in the registry.

    Attributes:
        name: Registered model.
        version: Its number.
        model_id: MLflow's logged model behind it, where there is one.
    """

    name: str
    version: int
    model_id: str | None


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        name: What it is referred to as.
        model: The unlocked model.
        tokenizer: Its tokenizer.
        lock: The lock of the locked arm; ``None``: there is no such arm.
        alpha: Its strength; the lock's default where it is not given.
        source: Fingerprint of the unlocked model's files; ``None`` where it came from no folder.
        version: The version in the registry that it is.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lock: SafetyLock | None = None
    alpha: float | None = None
    source: SourceFingerprint | None = None
    version: RegisteredVersion | None = None

    @classmethod
    def of(cls, pipeline: Any) -> Subject:
        """A loaded pipeline, or anything else with a model and its tokenizer.

        Raises:
            EvaluationError: It has none.
        """
        model, tokenizer = getattr(pipeline, "model", None), getattr(pipeline, "tokenizer", None)
        if model is None or tokenizer is None:
            raise EvaluationError(
                f"A {type(pipeline).__name__} has no model and tokenizer to measure.",
                next_step="Give a text-generation pipeline of transformers, or a model's folder or URI.",
            )
        return cls(getattr(model, "name_or_path", "") or type(model).__name__, model, tokenizer)

    @property
    def strength(self) -> float | None:
        """The strength of the lock, where there is one."""
        if self.lock is None or self.alpha is not None:
            return self.alpha
        return self.lock.metadata.default_alpha

    @property
    def dtype(self) -> str:
        """Number format of the model's weights, such as ``bfloat16``, and how they are quantised."""
        name = str(self.model.dtype).removeprefix("torch.")
        quantised = getattr(self.model.config, "quantization_config", None)
        if quantised is None:
            return name
        stated = quantised if isinstance(quantised, dict) else quantised.to_dict()
        method = stated.get("quant_method")
        # As in its file: a member of an enumeration reads otherwise, and not the same in every Python.
        return f"{name}, quantised by {getattr(method, 'value', method) or 'an unknown method'}"

    @property
    def device(self) -> str:
        """What the model computes on: the kind of device, and the name of a GPU."""
        import torch

        from mlflow_safelock.apply.placement import execution_device

        device = execution_device(self.model)
        if device.type != "cuda":
            return device.type
        return f"cuda, {torch.cuda.get_device_name(device)}"

    def with_lock(self, lock: SafetyLock | None, alpha: float | None) -> Subject:
        """The same with another lock, or strength, where they are given."""
        changed = self if lock is None else replace(self, lock=lock, alpha=None)
        return changed if alpha is None else replace(changed, alpha=alpha)

    @contextmanager
    def unlocked(self) -> Iterator[Subject]:
        """The same with its model unlocked for a while; a lock that the model carries becomes the subject's.

        Raises:
            LockMismatchError: It carries a lock, and another one was to be measured.
        """
        from mlflow_safelock.apply import apply_lock, handle_of

        handle = handle_of(self.model)
        if handle is None:
            yield self
            return
        lock, alpha = handle.lock, handle.alpha
        if (self.lock is not None and self.lock != lock) or self.alpha not in (None, alpha):
            raise LockMismatchError(
                f"The model carries the lock {lock.digest} at alpha {alpha:g} already.",
                next_step="Leave lock and alpha out, or take the lock off: handle_of(model).remove().",
            )
        handle.remove()
        try:
            yield replace(self, lock=lock, alpha=alpha)
        finally:
            apply_lock(self.model, lock, alpha)


def open_subject(reference: str, loading: ModelLoading = ONE_DEVICE, *, every_byte: bool = False) -> Subject:
    """Load what a reference names, unlocked, with the lock and the strength that it carries if it is locked.

    Args:
        reference: A local checkpoint folder, a hub id, or any MLflow model URI or folder; of a locked version
            the fine-tune behind it is loaded, after it was compared with the receipt.
        loading: Number format, and where the weights go.
        every_byte: Whether its fingerprint is of every byte, as evidence must be for a gate that asks for
            that (``fingerprint: full``), and not only of blocks. A locked version has that of its receipt,
            unless this is of blocks.

    Raises:
        SourceError: There is no such model, it cannot be loaded, or it is a locked folder that says nothing
            of its fine-tune.
        VerificationError: A locked version is not what its receipt says, or something was written over while
            it was loaded.
        PromotionRefused: It is an MLflow model in a form that would load with other weights than its own.
    """
    if not is_mlflow_model(reference):
        loaded = load_language_model(reference, loading)
        if "safelock" in loaded.model.config.to_dict():
            raise SourceError(
                f"The model {reference} is locked in its own weights.",
                next_step="Write the fine-tune first: safelock undo. Then measure that, with --lock.",
            )
        folder = Path(reference)
        source = _taken(folder, every_byte=every_byte) if folder.is_dir() else None
        return Subject(reference, loaded.model, loaded.tokenizer, source=source)
    version = _version_of(reference)
    subject = _open_mlflow_model(reference, fetch_mlflow_model(reference), loading, every_byte=every_byte)
    return replace(subject, name=reference, version=version)


def _open_mlflow_model(reference: str, folder: Path, loading: ModelLoading, *, every_byte: bool) -> Subject:
    from mlflow_safelock.flavors.overlay import FLAVOR_NAME, read_mlmodel
    from mlflow_safelock.flavors.standalone import is_standalone

    artifacts = LocalArtifacts(folder)
    described = read_mlmodel(artifacts)
    if FLAVOR_NAME not in described["flavors"]:
        taken = _taken(folder, every_byte=every_byte)
        loaded = load_language_model(str(folder), loading)
        _check_still(taken, folder, reference)
        return Subject(reference, loaded.model, loaded.tokenizer, source=taken)
    if is_standalone(described):
        return _open_standalone(reference, folder, loading, every_byte=every_byte)
    from mlflow_safelock.flavors.locked_model import fetch_source
    from mlflow_safelock.flavors.overlay import read_overlay

    overlay = read_overlay(artifacts)
    stated = overlay.receipt.predicate
    source = fetch_source(overlay)
    fingerprint = _fingerprint_of(stated.source.fingerprint, source, every_byte=every_byte)
    loaded = load_language_model(str(source), loading)
    _check_still(fingerprint, source, reference)
    return Subject(reference, loaded.model, loaded.tokenizer, overlay.lock, stated.alpha, fingerprint)


def _taken(folder: Path, *, every_byte: bool) -> SourceFingerprint:
    """The fingerprint of a folder; of an MLflow model before it is loaded, and compared afterwards."""
    return (measure if every_byte else take_fingerprint)(LocalArtifacts(folder))


def _check_still(taken: SourceFingerprint, folder: Path, reference: str) -> None:
    try:
        check_fingerprint(taken, LocalArtifacts(folder))
    except VerificationError as error:
        raise VerificationError(
            f"The files of {reference} were written over while it was loaded.",
            next_step="Wait until whatever writes them is done, then measure again.",
        ) from error


def _fingerprint_of(stated: SourceFingerprint, source: Path, *, every_byte: bool) -> SourceFingerprint:
    """What a receipt says of a fine-tune; where that is too little, what is there, as that says."""
    return _taken(source, every_byte=True) if every_byte and not stated.is_full else stated


def _open_standalone(reference: str, folder: Path, loading: ModelLoading, *, every_byte: bool) -> Subject:
    """Undo the lock in a copy; the lock itself comes from where it was taken, since only biases are here."""
    from mlflow_safelock.flavors.overlay import RECEIPT_FILE
    from mlflow_safelock.flavors.standalone import unlock_standalone

    receipt = Receipt.parse(LocalArtifacts(folder).read(RECEIPT_FILE), origin=f"{reference}/{RECEIPT_FILE}")
    stated = receipt.predicate
    if stated.lock.model is None:
        raise SourceError(
            f"The lock {stated.lock.digest} in {reference} comes from no registry.",
            next_step="Write the fine-tune first: safelock undo. Then measure that, with --lock.",
        )
    lock = load_lock_reference(f"models:/{stated.lock.model}/{stated.lock.version}")
    if lock.digest != stated.lock.digest:
        raise SourceError(
            f"models:/{stated.lock.model}/{stated.lock.version} is not the lock that {reference} carries."
        )
    with TemporaryDirectory(prefix="safelock-") as temporary:
        fine_tune = Path(temporary) / "fine-tune"
        unlock_standalone(folder, fine_tune)
        fingerprint = _fingerprint_of(stated.source.fingerprint, fine_tune, every_byte=every_byte)
        loaded = load_language_model(str(fine_tune), loading)
    return Subject(reference, loaded.model, loaded.tokenizer, lock, stated.alpha, fingerprint)


def _version_of(reference: str) -> RegisteredVersion | None:
    """The registered version that a reference names, by its number, stage or alias."""
    if not re.fullmatch(r"models:/[^/@]+(/[^/]+|@[^/]+)", reference):
        return None
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    client = MlflowClient()
    try:
        name, number = get_model_name_and_version(client, reference)
        found = client.get_model_version(name, number)
    except MlflowException as error:
        raise SourceError(
            f"There is no version {reference}: {error.message}",
            next_step="Check the name and version, and --tracking-uri and --registry-uri.",
        ) from error
    # An SQL registry knows the logged model only as what the version was made from.
    logged = re.fullmatch(r"models:/(m-[0-9a-f]+)", found.source or "")
    return RegisteredVersion(name, int(found.version), found.model_id or (logged and logged[1]))
