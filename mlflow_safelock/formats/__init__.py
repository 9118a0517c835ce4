"""How a lock is stored and read: this project's own format, and the published one.

Nothing a lock file holds is ever executed, on any path: bytes are checked, then turned into plain numbers.
"""

from __future__ import annotations

from mlflow_safelock.formats.lock_file import load_lock, lock_from_bytes, lock_to_bytes, save_lock
from mlflow_safelock.formats.published import import_published_lock

__all__ = ["import_published_lock", "load_lock", "lock_from_bytes", "lock_to_bytes", "save_lock"]
