"""Whether the biases that a fine-tune is stored with take a lock's push back, or are a lock's already."""

from __future__ import annotations

from mlflow_safelock.apply.own_biases import added_behind, biased_paths, fault_of, head_outputs
from mlflow_safelock.errors import PromotionRefused
from mlflow_safelock.gate.effect import Arriving, shares_through
from mlflow_safelock.gate.source import LanguageModel
from mlflow_safelock.lock import SafetyLock

_WAY_OUT = "If its base has such biases itself, set 'own_biases: ignore' in the policy's gate for it."


def check_own_biases(source: LanguageModel, lock: SafetyLock, alpha: float, arriving: Arriving) -> None:
    """Refuse a fine-tune whose own biases take a lock's push back, or are a lock's already.

    Nothing is read of a model without such biases. Nothing is told for a lock without unit biases.

    Args:
        source: The fine-tune.
        lock: The lock, with what its base makes of it (``unit_biases``).
        alpha: Its strength.
        arriving: How much of the push arrives as the weights are; what is missing counts as taken back.

    Raises:
        PromotionRefused: They do, or are; or it is an adapter with biases, which are added to those of a base
            that is not here.
        SourceError: They cannot be read.
    """
    if source.adapter is not None and source.adapter.biases:
        raise PromotionRefused(
            "lock_taken_back",
            f"The adapter has biases ({source.adapter.biases[0]!r}), which may take back what a lock adds, "
            "and it is promoted without its base, so that this cannot be told.",
            next_step="Train it without biases, or merge it (model.merge_and_unload()) and log that, or set "
            "'own_biases: ignore' in the policy's gate for it.",
        )
    weights, architecture = source.weights, source.architecture
    if weights is None or architecture is None or lock.unit_biases is None:
        return
    biases = weights.biases(architecture, lock.geometry, biased_paths(architecture))
    through = shares_through(
        weights,
        architecture,
        lock,
        alpha,
        head_outputs(biases, architecture, lock.geometry),
        added_behind(biases, architecture, lock.geometry),
    )
    shares, estimated = dict(arriving.shares), set(arriving.shares)
    while True:
        fault = fault_of(biases, through, shares, architecture, lock, alpha)
        if fault is None or fault.layer not in estimated:
            break
        # Nobody is refused by the rows that were drawn.
        shares[fault.layer] = arriving.exactly(fault.layer)
        estimated.remove(fault.layer)
    if fault is None:
        return
    if fault.is_lock:
        raise PromotionRefused(
            "already_locked",
            f"The model has biases of its own that {fault.what}, as if it was saved with a lock.",
            next_step=f"Register the fine-tune that it was made from, and promote that one. {_WAY_OUT}",
        )
    raise PromotionRefused(
        "lock_taken_back",
        f"The model has biases of its own that {fault.what}.",
        next_step=f"Register a fine-tune without them. {_WAY_OUT}",
    )
