"""Locking a loaded model, and unlocking it again.

::

    handle = apply_lock(model, lock, alpha=6.0)
    ...                        # generate, serve, evaluate: the model is locked
    handle.verify()            # raises unless every bias is what lock and weights make it
    handle.remove()            # the model is what it was

    with apply_lock(model, lock):
        ...                    # locked here only
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from mlflow_safelock.apply.alpha import checked_alpha
from mlflow_safelock.apply.architectures import Attention, attention_of
from mlflow_safelock.apply.carriers import AppliedLock, Carrier, carrier_on, carriers_for, compile_anew
from mlflow_safelock.apply.config_entry import CONFIG_KEY, LiveEntry, config_entry, refuse_locked_config
from mlflow_safelock.apply.displacement import displacements
from mlflow_safelock.apply.saving import save_as_before, save_locked
from mlflow_safelock.errors import AlreadyLockedError, LockMismatchError, VerificationError
from mlflow_safelock.lock import AttentionGeometry, SafetyLock

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class LockHandle:
    """A lock on a loaded model: checks it and takes it off. As a context manager it takes it off at the end.

    Attributes:
        lock: The lock.
        alpha: Its strength.
    """

    def __init__(self, carriers: tuple[Carrier, ...], model: PreTrainedModel) -> None:
        self.lock = carriers[0].applied.lock
        self.alpha = carriers[0].applied.alpha
        self._carriers = carriers
        self._model = model

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that the lock displaces, ascending."""
        return tuple(carrier.displacement.layer for carrier in self._carriers)

    def verify(self, *, recompute: bool = True) -> None:
        """Prove that the lock is in force.

        Args:
            recompute: Whether to compute anew, from the weights as they are now, what each locked layer has
                to have; otherwise what is in place is compared with what locking computed.

        Raises:
            VerificationError: It is not, and the layer that shows it: the lock was removed, a bias or hook
                is gone or has another value, the projection was wrapped or replaced or runs another forward,
                the weights changed so that the bias no longer fits them, or the layer carries another lock.
        """
        self._check_whole()
        projections = dict(enumerate(attention_of(self._model).projections))
        for carrier in self._carriers:
            layer = carrier.displacement.layer
            if not carrier.attached:
                raise VerificationError(f"Layer {layer}: the lock was removed.", next_step="Apply it again.")
            if projections.get(layer) not in carrier.modules:
                raise VerificationError(
                    f"Layer {layer}: its output projection was wrapped or replaced after it was locked.",
                    next_step="Remove the lock and apply it to the model as it is now.",
                )
            if carrier.is_bypassed:
                raise VerificationError(
                    f"Layer {layer}: its output projection was given another forward after it was locked, "
                    "which may leave out the bias that carries the lock.",
                    next_step="Remove the lock and apply it to the model as it is now.",
                )
            if recompute:
                carrier.verify()
            else:
                carrier.check_untouched()

    def _check_whole(self) -> None:
        """Raise unless there is a carrier of the one lock, at the one strength, for every layer of it."""
        missing = {*self.lock.layers} - {*self.layers}
        if missing:
            raise VerificationError(
                f"Layer {min(missing)}: it does not carry the lock as the others do.",
                next_step="Load the model again, and apply the lock to it.",
            )
        for carrier in self._carriers:
            applied = carrier.applied
            if (applied.lock.digest, applied.alpha) != (self.lock.digest, self.alpha):
                raise VerificationError(
                    f"Layer {carrier.displacement.layer}: it carries the lock {applied.lock.digest} at alpha "
                    f"{applied.alpha}, and other layers {self.lock.digest} at {self.alpha}.",
                    next_step="Load the model again, and apply the lock to it.",
                )

    def remove(self) -> None:
        """Unlock the model: every parameter is the one that it was. Doing it again does nothing.

        Raises:
            VerificationError: A bias or hook is not what locking put there, so what it stands for would be
                destroyed. The model stays as it is.
        """
        attached = [carrier for carrier in self._carriers if carrier.attached]
        for carrier in attached:
            carrier.check_untouched()
        for carrier in attached:
            carrier.detach()
        if not attached:
            return
        compile_anew(attached)
        save_as_before(self._model)
        config = _config_of(self._model)
        if isinstance(getattr(config, CONFIG_KEY, None), LiveEntry):
            delattr(config, CONFIG_KEY)

    def __enter__(self) -> LockHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "on" if all(carrier.attached for carrier in self._carriers) else "removed"
        return f"LockHandle({self.lock!r}, alpha={self.alpha}, {state})"


def apply_lock(model: PreTrainedModel, lock: SafetyLock, alpha: float = 6.0) -> LockHandle:
    """Lock a loaded model in place, whatever its dtype and device.

    Each locked layer's attention output projection gets the bias ``W_o v`` (``displacement``), computed from
    this model's own weights. Where a projection's weight is not a plain matrix (quantised, wrapped by an
    adapter, offloaded) a hook adds ``v`` to its input instead. Either the whole lock is applied or nothing.

    The lock follows the model through ``copy.deepcopy``; ``handle_of`` gives the handle of the copy.

    Args:
        model: A ``transformers`` model of a known architecture, or a PEFT model around one.
        lock: A lock of the model's base.
        alpha: Strength; negative pushes the other way.

    Returns:
        The handle that checks and removes the lock.

    Raises:
        AlphaError: Alpha is not a finite number other than zero, or too large or too small for the model's
            dtype.
        AlreadyLockedError: The model carries a lock, or was saved from one that did.
        LockMismatchError: The lock is for another attention shape.
        UnsupportedArchitectureError: The model's attention heads are not known.
    """
    strength = checked_alpha(alpha)
    attention, config = attention_of(model), _config_of(model)
    name = _name_of(model)
    check_geometry(lock, attention.geometry, name)
    refuse_locked_config(config, f"Model {name!r}")
    _refuse_locked(attention, name)
    carriers = carriers_for(AppliedLock(lock, strength), displacements(lock, strength), attention, model)
    handle = LockHandle(carriers, model)
    try:
        for carrier in carriers:
            carrier.attach()
        compile_anew(carriers)
        setattr(config, CONFIG_KEY, LiveEntry(config_entry(lock, strength)))
        save_locked(model, attention.layers)
    except BaseException:
        handle.remove()
        raise
    return handle


def handle_of(model: PreTrainedModel) -> LockHandle | None:
    """The handle of the lock that a loaded model carries, or ``None``.

    For a model whose handle is not at hand, such as a deep copy of a locked one.

    Raises:
        UnsupportedArchitectureError: The model's attention heads are not known.
    """
    found = (carrier_on(projection) for projection in attention_of(model).projections)
    carriers = tuple(carrier for carrier in found if carrier is not None)
    return LockHandle(carriers, model) if carriers else None


def check_geometry(lock: SafetyLock, geometry: AttentionGeometry, name: str) -> None:
    """Raise unless a lock is for models of this attention shape.

    Args:
        lock: The lock.
        geometry: The model's attention shape.
        name: The model's name, for the error.

    Raises:
        LockMismatchError: It is for another shape, or no lock.
    """
    if not isinstance(lock, SafetyLock):
        raise LockMismatchError(
            f"The lock is of type {type(lock).__name__!r}, and not a SafetyLock.",
            next_step="Read one from its file: load_lock(path).",
        )
    if lock.geometry != geometry:
        raise LockMismatchError(
            f"The lock is for {lock.geometry}, and model {name!r} has {geometry}.",
            next_step=f"This lock is for fine-tunes of {lock.base_model!r}; use a lock of this model's base.",
        )


def _refuse_locked(attention: Attention, name: str) -> None:
    for projection in attention.projections:
        carrier = carrier_on(projection)
        if carrier is not None:
            applied = carrier.applied
            raise AlreadyLockedError(
                f"Model {name!r} carries a lock already ({applied.lock.digest} at alpha {applied.alpha}), "
                "and a second one would push twice.",
                next_step="Remove it first: handle_of(model).remove().",
            )


def _config_of(model: PreTrainedModel) -> PretrainedConfig:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).config


def _name_of(model: PreTrainedModel) -> str:
    return getattr(_config_of(model), "name_or_path", "") or type(model).__name__
