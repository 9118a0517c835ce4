"""Leases: who is at work on a version, so that nobody does the same work beside them.

A lease only saves work. What decides who changes a version is the condition in the transaction that redirects
it (``Registry.redirect``), which holds with any lease, an expired one, and none. The one for unlocking is a
sign as well: a promotion that passed the gate before it looks for it at its end (``Registry.is_unlocked``).

A lease ends with the transaction that its work ends in. One whose holder died is free at once, where whoever
asks runs on the same machine and can see that; on another machine it is free once it has expired.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.orm import Session

from mlflow_safelock.apply.checkpoint.progress import Progress

TABLE = sa.Table(
    "safelock_leases",
    sa.MetaData(),
    sa.Column("workspace", sa.String(63), primary_key=True),
    sa.Column("model", sa.String(256), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("purpose", sa.String(16), primary_key=True),
    sa.Column("holder", sa.String(256), nullable=False),
    sa.Column("expires", sa.Double, nullable=False),
)

SECONDS = {"promote": 60.0, "unlock": 60.0, "register": 60.0, "prepare": 3600.0, "write": 3600.0}
"""How long a lease lasts by what it is for; a preparation renews its own while bytes move."""

RENEWED_AFTER = 60.0

FAST = 5.0
"""Seconds by which another machine's clock may be ahead."""

_PROCESSES = Path("/proc")

_IS = (
    TABLE.c.workspace == sa.bindparam("of_workspace"),
    TABLE.c.model == sa.bindparam("of_model"),
    TABLE.c.version == sa.bindparam("of_version"),
    TABLE.c.purpose == sa.bindparam("of_purpose"),
)
# Put together once, as in the ledger.
_FOUND = sa.select(TABLE.c.holder, TABLE.c.expires).where(*_IS)
_HELD = sa.select(TABLE.c.holder).where(*_IS, TABLE.c.expires > sa.bindparam("now"))
_TAKING = TABLE.insert()
_TAKING_OVER = TABLE.update().where(*_IS, TABLE.c.holder == sa.bindparam("other"))
_RELEASING = TABLE.delete().where(TABLE.c.holder == sa.bindparam("holder"))


@dataclass(frozen=True)
class Work:
    """What a lease is for.

    Attributes:
        workspace: MLflow workspace.
        model: Registered model.
        version: Its version.
        purpose: What is being done to it.
        location: The locked model that is written, where it is no version that somebody is at work on.
    """

    workspace: str
    model: str
    version: int
    purpose: Literal["promote", "unlock", "register", "prepare", "write"] = "promote"
    location: str | None = field(default=None, compare=False)

    @classmethod
    def writing(cls, location: str) -> Work:
        """Writing a locked model at a location, for whichever of the versions that share its fine-tune."""
        return cls("*", hashlib.sha256(location.encode()).hexdigest(), 0, "write", location)

    def __str__(self) -> str:
        if self.location is not None:
            return f"The locked model at {self.location}"
        if self.purpose == "register":
            return f"A new version of {self.model!r}"
        return f"{self.model!r} version {self.version}"

    @property
    def key(self) -> dict[str, Any]:
        """The columns by which it is found."""
        return {name: getattr(self, name) for name in ("workspace", "model", "version", "purpose")}

    @property
    def found_by(self) -> dict[str, Any]:
        """The same as parameters of a statement."""
        return {f"of_{name}": value for name, value in self.key.items()}


@dataclass
class Lease:
    """Being the one who is at work on a version.

    Attributes:
        holder: Its name in the database.
        renew: Lets it last as long as a new one.
        over: Whether it was given back already.
    """

    holder: str
    renew: Callable[[], None]
    over: bool = False


def renewing(lease: Lease, progress: Progress) -> Progress:
    """Progress that also renews a lease, once a minute while bytes move."""
    renewed = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal renewed
        if time.monotonic() - renewed > RENEWED_AFTER:
            renewed = time.monotonic()
            lease.renew()
        progress(what, done, total)

    return show


def new_holder() -> str:
    """A name for a new lease of this process: its machine, its number and start, and what makes it unique."""
    return "|".join((_machine(), str(os.getpid()), _start_of(os.getpid()) or "", uuid4().hex))


def process_of(holder: str) -> str:
    """A holder, for people."""
    machine, pid, *_ = holder.split("|")
    return f"process {pid} on {machine.partition('/')[0]}"


def is_gone(holder: str) -> bool:
    """Whether a lease's holder is known to be dead: a process of this machine that is there no more."""
    machine, pid, start, *_ = holder.split("|")
    return machine == _machine() and bool(start) and _start_of(int(pid)) != start


def take(session: Session, work: Work, holder: str) -> str | None:
    """Take a lease in the session's transaction, over from a dead or late holder where there is one.

    Returns:
        ``None`` once it is taken; otherwise who has it.

    Raises:
        sqlalchemy.exc.IntegrityError: Somebody else took it at the same moment; repeat the transaction.
    """
    now = time.time()
    mine = {"holder": holder, "expires": now + SECONDS[work.purpose]}
    row = session.execute(_FOUND, work.found_by).one_or_none()
    if row is None:
        session.execute(_TAKING, {**work.key, **mine})
        return None
    other = str(row.holder)
    if row.expires > now and not is_gone(other):
        return other
    taken = session.execute(_TAKING_OVER.values(**mine), {**work.found_by, "other": other})
    return None if taken.rowcount == 1 else other  # type: ignore[attr-defined]


def lasts(session: Session, holder: str) -> bool:
    """Whether a lease is still held, also by a clock that is a little fast."""
    chosen = sa.select(TABLE.c.expires).where(TABLE.c.holder == holder)
    expires = session.execute(chosen).scalar_one_or_none()
    return expires is not None and expires > time.time() + FAST


def renew(session: Session, work: Work, holder: str) -> None:
    """Let a lease that is still held last as long as a new one."""
    expires = time.time() + SECONDS[work.purpose]
    session.execute(_TAKING_OVER.values(expires=expires), {**work.found_by, "other": holder})


def release(session: Session, holder: str) -> None:
    """Give a lease back in the session's transaction; nothing happens where somebody took it over."""
    session.execute(_RELEASING, {"holder": holder})


def held(session: Session) -> list[Work]:
    """What somebody is at work on now, as far as can be known."""
    rows = session.execute(sa.select(TABLE).where(TABLE.c.expires > time.time()))
    return [
        Work(row.workspace, row.model, row.version, row.purpose) for row in rows if not is_gone(row.holder)
    ]


def is_held(session: Session, work: Work) -> bool:
    """Whether somebody is at that work now, as far as can be known."""
    holder = session.execute(_HELD, {**work.found_by, "now": time.time()}).scalar_one_or_none()
    return holder is not None and not is_gone(holder)


def _machine() -> str:
    """This machine, and on Linux what numbers its processes: containers may share a name."""
    try:
        numbering = os.readlink(_PROCESSES / "self/ns/pid")
    except OSError:
        numbering = ""
    return f"{socket.gethostname()}/{numbering}"


def _start_of(pid: int) -> str | None:
    """When a process started, as the kernel counts; ``None`` where there is none, or that cannot be known."""
    try:
        # The name, in brackets, may hold anything; what follows it are numbers but for the state.
        state, *rest = (_PROCESSES / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in (b"Z", b"X") else rest[18].decode()
