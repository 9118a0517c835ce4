"""Safety locks for fine-tuned LLMs, enforced where models are promoted: the MLflow model registry.

The names below load what they need when they are first used, so that importing this package is cheap: MLflow
imports it in every process, wanted or not, because it registers a store.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow_safelock.apply import apply_lock, compare, save_locked_checkpoint
    from mlflow_safelock.forging import forge, forge_from_activations
    from mlflow_safelock.formats import import_published_lock, load_lock, save_lock
    from mlflow_safelock.lock import SafetyLock

_HOMES = {
    "SafetyLock": "mlflow_safelock.lock",
    "apply_lock": "mlflow_safelock.apply",
    "compare": "mlflow_safelock.apply",
    "forge": "mlflow_safelock.forging",
    "forge_from_activations": "mlflow_safelock.forging",
    "import_published_lock": "mlflow_safelock.formats",
    "load_lock": "mlflow_safelock.formats",
    "save_lock": "mlflow_safelock.formats",
    "save_locked_checkpoint": "mlflow_safelock.apply",
}

__all__ = [
    "SafetyLock",
    "apply_lock",
    "compare",
    "forge",
    "forge_from_activations",
    "import_published_lock",
    "load_lock",
    "save_lock",
    "save_locked_checkpoint",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
