"""Places where a test has the process killed, one after each step that a crash could come after.

They are what "whatever happens in between" is tested with. Where ``SAFELOCK_FAILPOINT`` is not set, passing
one costs a look into the environment.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "SAFELOCK_FAILPOINT"

IN_A_TRANSACTION = ("transaction-begun", "redirected", "ledger-appended", "committed")
"""The one transaction of a promotion, and of unlocking; the last is after it."""

OVERLAY = (
    *("policy-read", "lease-taken", "approved"),
    *("overlay-written", "artifacts-aside", "overlay-published", "overlay-read-back"),
    *IN_A_TRANSACTION,
    *("gate-passed", "transition-done"),
)
"""A promotion that writes an overlay, step by step."""

STANDALONE = (
    *("policy-read", "lease-taken", "approved", "standalone-found"),
    *IN_A_TRANSACTION,
    *("gate-passed", "transition-done"),
)
"""A promotion of a standalone model that was prepared before."""

PREPARE = (
    "prepare-approved",
    "standalone-aside",
    "standalone-published",
    "standalone-read-back",
    "standalone-recorded",
)
"""Writing a standalone model on a file system."""

MEASURE = ("prepare-approved", "measured", "measurement-published", "measurement-recorded")
"""Writing a full fingerprint on a file system."""

UNLOCK = ("unlock-approved", *IN_A_TRANSACTION)
"""Taking a lock off."""

WITHDRAW = ("transaction-begun", "withdrawn", "ledger-appended", "committed")
"""Taking a version out of its stage and aliases."""

RENAME = ("rename-checked", "renamed", "rename-recorded")
"""Renaming a registered model; the last is after each version's row."""

_NAMES = frozenset((*OVERLAY, *STANDALONE, *PREPARE, *MEASURE, *UNLOCK, *WITHDRAW, *RENAME))


def reach(name: str) -> None:
    """Kill this process at once, as the machine's power would, where the environment names this place.

    Args:
        name: The place, one of those above.
    """
    if name == os.environ.get(VARIABLE):
        assert name in _NAMES, name
        os.kill(os.getpid(), signal.SIGKILL)
