"""Clocks: this machine's beside those of the database and of the server.

Leases end by the clock of whoever looks at them, and locks grow old by it.
"""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime

import sqlalchemy as sa

from mlflow_safelock.gate.leases import SECONDS
from mlflow_safelock.operations.findings import Finding

CHECK = "clock"

TOLERATED = 5.0
"""Seconds by which clocks may differ before it is told."""

TOO_MUCH = SECONDS["promote"] / 2
"""Seconds from which on a lease can end long before its holder is done."""

_NOW = {
    "postgresql": "SELECT extract(epoch FROM clock_timestamp())",
    "mysql": "SELECT unix_timestamp(now(6))",
}
"""Seconds since 1970 by the clock of a database server, by its kind."""


def ask_database_clock(engine: sa.Engine) -> Finding:
    """How far this machine's clock is from the database server's."""
    statement = _NOW.get(engine.dialect.name)
    if statement is None:
        return Finding(CHECK, "skipped", f"A database of {engine.dialect.name} has this machine's clock.")
    with engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))  # what connecting takes does not count
        before = time.time()
        told = float(connection.execute(sa.text(statement)).scalar_one())
        after = time.time()
    return compare("the database's", told, before, after)


def ask_server_clock(date: str | None, before: float, after: float) -> Finding:
    """How far this machine's clock is from an HTTP server's.

    Args:
        date: The header ``Date`` of its answer.
        before: When it was asked, by this machine's clock.
        after: When it had answered.
    """
    try:
        told = parsedate_to_datetime(date or "").timestamp() + 0.5  # it tells whole seconds
    except ValueError:
        return Finding(CHECK, "skipped", "The server does not say what time it is.")
    return compare("the server's", told, before, after)


def compare(whose: str, told: float, before: float, after: float) -> Finding:
    """What the difference of two clocks means.

    Args:
        whose: Whose the other clock is.
        told: Seconds by that one, at some time between ``before`` and ``after``.
        before: Seconds by this machine's.
        after: The same, later.
    """
    apart = told - (before + after) / 2
    facts = {"seconds": round(apart, 3)}
    # As little as it can be, since the answer may have been made at the beginning or at the end.
    least = max(0.0, abs(apart) - (after - before) / 2)
    if least <= TOLERATED:
        return Finding(CHECK, "ok", f"This machine's clock and {whose} agree.", "", facts)
    way = "behind" if apart > 0 else "ahead of"
    return Finding(
        CHECK,
        "fault" if least > TOO_MUCH else "warning",
        f"This machine's clock is {least:.0f} seconds {way} {whose}: leases end too early or too late, and "
        "times in the ledger are not in order.",
        "Let all machines set their clocks by the same servers (NTP).",
        facts,
    )
