"""Where a lock goes once it is made: to a file, and into MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_safelock.cli.lock_report import lock_facts, show_lock
from mlflow_safelock.cli.options import MlflowAddress
from mlflow_safelock.cli.output import show_json, working

if TYPE_CHECKING:
    from mlflow_safelock.lock import SafetyLock


def deliver(lock: SafetyLock, output: Path, register_at: MlflowAddress | None, form: str = "table") -> None:
    """Write a lock file, register the lock where an address is given, and show it.

    Raises:
        LockError: The file cannot be written.
        mlflow.exceptions.MlflowException: MLflow cannot be reached, or refuses; the file is written.
    """
    from mlflow_safelock.formats import save_lock

    save_lock(lock, output)
    registered = None if register_at is None else register_lock(lock, register_at)
    if form == "json":
        show_json({"file": str(output), "registered": registered, **lock_facts(lock)})
    else:
        show_lock(lock, written=output, registered=registered)


def deliver_several(locks: Sequence[SafetyLock], output: Path, form: str = "table") -> None:
    """Write a lock file for each number of heads, ``output`` with the number added to its name, and show it.

    Raises:
        LockError: A file cannot be written.
    """
    from mlflow_safelock.formats import save_lock

    facts = []
    for lock in locks:
        file = output.with_stem(f"{output.stem}-{len(lock.heads)}")
        save_lock(lock, file)
        if form == "table":
            show_lock(lock, written=file, registered=None)
        facts.append({"file": str(file), "registered": None, **lock_facts(lock)})
    if form == "json":
        show_json(facts)


def register_lock(
    lock: SafetyLock,
    mlflow_address: MlflowAddress,
    name: str | None = None,
    signature_file: bytes | None = None,
) -> str:
    """Log a lock to MLflow and register it.

    Args:
        lock: The lock.
        mlflow_address: Where MLflow is.
        name: Registered model; where the gate looks, if it is not given.
        signature_file: The lock's signature.

    Returns:
        ``models:/`` URI of the new version.

    Raises:
        mlflow.exceptions.MlflowException: MLflow cannot be reached, or refuses.
    """
    with working("Registering the lock"):
        from mlflow_safelock.flavors import meta_safetylock

        mlflow_address.reach()
        model = name or meta_safetylock.lock_model_name(lock.base_model)
        info = meta_safetylock.log_model(lock, registered_model_name=model, signature_file=signature_file)
    return f"models:/{model}/{info.registered_model_version}"
