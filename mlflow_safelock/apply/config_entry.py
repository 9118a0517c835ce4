"""The ``safelock`` entry of a model's configuration: by it a locked model is recognised after it was saved.

The entry keeps a lock from being applied twice. It is a reason to refuse, never evidence that a lock is in
force: anybody can write or delete it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from mlflow_safelock.errors import AlreadyLockedError
from mlflow_safelock.lock import SafetyLock

CONFIG_KEY = "safelock"
"""Name of the entry in ``config.json``."""


class LiveEntry(dict[str, Any]):
    """An entry in the configuration of a model in memory, whose carriers are the better evidence.

    Models made from one configuration object share it, so the entry cannot tell which of them is locked.
    Saved with ``save_pretrained`` and loaded again it is an ordinary entry.
    """


def config_entry(lock: SafetyLock, alpha: float) -> dict[str, Any]:
    """What the entry says: ``lock`` (its digest), ``base_model``, and ``alpha``."""
    return {"lock": lock.digest, "base_model": lock.base_model, "alpha": alpha}


def refuse_locked_config(config: PretrainedConfig | Mapping[str, Any], subject: str) -> None:
    """Raise if a configuration says that its model was saved with a lock.

    Args:
        config: A ``transformers`` configuration, or the contents of a ``config.json``.
        subject: What the configuration belongs to, for the error.

    Raises:
        AlreadyLockedError: It has a ``safelock`` entry.
    """
    values = config if isinstance(config, Mapping) else vars(config)
    entry = values.get(CONFIG_KEY)
    if entry is None or isinstance(entry, LiveEntry):
        return
    said = entry if isinstance(entry, Mapping) else {}
    raise AlreadyLockedError(
        f"{subject} was saved with a lock in it ({said.get('lock', 'unknown lock')} "
        f"at alpha {said.get('alpha', 'unknown')}), and a second one would push twice.",
        next_step="Lock the unlocked fine-tune instead.",
    )
