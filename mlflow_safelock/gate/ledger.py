"""The ledger: what the gate decided, append-only, each row chained to the one before by its hash.

Its table stands beside MLflow's own in the registry's database. A row's ``body`` is canonical JSON (RFC
8785); ``digest`` is SHA-256 over the previous row's digest and the body. ``sequence`` is unique and without
gaps, so that two writers cannot fork the chain: the slower one fails and tries again on the new end.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import rfc8785
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator
from sqlalchemy.orm import Session

from mlflow_safelock.errors import BrokenLedgerError, LedgerError
from mlflow_safelock.lock import Digest, NonEmpty
from mlflow_safelock.provenance import Actor, Contents

GENESIS = "0" * 64
"""What the first row is chained to."""

TABLE = sa.Table(
    "safelock_ledger",
    sa.MetaData(),
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("workspace", sa.String(63), nullable=False),
    sa.Column("event", sa.String(32), nullable=False),
    sa.Column("model", sa.String(256), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("location_key", sa.String(64), nullable=True, index=True),
    sa.Column("previous", sa.String(64), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Index("ix_safelock_ledger_version", "model", "version"),
)


LOCKING = ("promoted", "renamed")
"""Events by which a version is locked."""

TokenizerFinding = Literal["same", "unknown", "ignored"]
"""Whether a fine-tune's tokenizer has all that the lock knows of its base's: it has; that cannot be told; or
the policy did not ask."""

DECISIONS = (*LOCKING, "passed", "unlocked")
"""Events that decide what a version serves."""


Event = Literal[
    "promoted",
    "rejected",
    "passed",
    "unlocked",
    "renamed",
    "evaluated",
    "registered",
    "revoked",
    "prepared",
    "written",
    "policy",
    "reconciled",
]


def now() -> str:
    """The time of a row that is written now, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class LockInForce(BaseModel):
    """The lock that a promotion applied."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    model: NonEmpty
    version: Annotated[int, Field(gt=0)]
    digest: Digest
    base_model: NonEmpty

    def is_below(self, other: LockInForce) -> bool:
        """Whether it is a version of the same registered model with a lower number."""
        return self.model == other.model and self.version < other.version


class LedgerEntry(BaseModel):
    """One decision.

    Attributes:
        event: ``promoted`` (locked), ``rejected``, ``passed`` (let through unlocked, as the policy says),
            ``unlocked`` (the lock was taken off), ``renamed`` (a promotion goes on under another name),
            ``evaluated`` (it was measured; the receipt is the digest of the statement at the location),
            ``registered`` (a lock was seen, for the first time, as another version, or as signed since; model
            and version are the lock's), ``revoked``
            (a lock may not be applied any more; model and version are the lock's), ``prepared`` (every byte
            of its fine-tune was read; the full fingerprint is at ``location``), ``written`` (a standalone
            model was written at ``location``, ahead of the promotion that is to serve it), ``policy``
            (another policy came into force; there is no model, and the version is 0), or ``reconciled``
            (something past the gate was put right; what a version serves is decided by the other rows alone).
        time: ISO 8601 in UTC.
        workspace: MLflow workspace; ``default`` where workspaces are off.
        model: Registered model.
        version: Its number.
        target: ``stage:…`` or ``alias:…``.
        actor: Who asked.
        reason: Reason code of a rejection, pass, unlocking or revocation; what a reconciliation did.
        message: The sentence that went with it.
        policy: Digest of the policy in force.
        lock: The lock in force after a promotion, or the one that the row is about.
        alpha: Its strength.
        original_location: Where the unlocked artifacts are.
        location: Where the locked model is, or the full fingerprint.
        receipt: Digest of its receipt.
        kinship: Cosine between the fine-tune's weights and the base's; ``None`` where it is not known.
        evaluations: Digests of the evaluations that a promotion rests on, where its policy asked for them.
        tokenizer: Whether the fine-tune's tokenizer is its base's; ``None`` in rows from before it was asked.
        fingerprint: Digest of the fine-tune's full fingerprint; ``None`` where only blocks were compared.
        contents: What was let through unlocked; ``None`` where there was nothing to read, as of a prompt.
        first_version: The version that the lock was registered as first; ``None`` where that is not told.
        asked: What the gate of a promotion asked for beside that (``gate.asked``), as its policy has it;
            ``None`` where it asked for nothing of the kind, and in rows from before it was put on record.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    event: Event
    time: NonEmpty = Field(default_factory=now)
    workspace: NonEmpty
    model: NonEmpty
    version: Annotated[int, Field(ge=0)]
    target: NonEmpty
    actor: Actor
    reason: str | None = None
    message: str | None = None
    policy: Digest
    lock: LockInForce | None = None
    alpha: float | None = None
    original_location: str | None = None
    location: str | None = None
    receipt: Digest | None = None
    kinship: float | None = None
    evaluations: tuple[Digest, ...] = ()
    fingerprint: Digest | None = None
    tokenizer: TokenizerFinding | None = None
    contents: Contents | None = None
    asked: dict[str, JsonValue] | None = None
    first_version: int | None = None

    @field_validator("evaluations", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @property
    def lock_digest(self) -> str | None:
        """Digest of the lock that the row is about."""
        return None if self.lock is None else self.lock.digest

    @property
    def locks(self) -> bool:
        """Whether this is a decision by which a version is locked."""
        return self.event in LOCKING


_logger = logging.getLogger(__name__)

_Conditions = tuple[sa.ColumnElement[bool], ...]

# What every promotion asks is put together once: putting a statement together takes longer than its answer.
_BACKWARDS = TABLE.c.sequence.desc()
_END = sa.select(TABLE.c.sequence, TABLE.c.digest).order_by(_BACKWARDS).limit(1)
_KEYED = sa.select(TABLE).where(
    TABLE.c.location_key == sa.bindparam("key"), TABLE.c.event == sa.bindparam("event")
)
_LAST_KEYED = _KEYED.order_by(_BACKWARDS).limit(1)
_FIRST_KEYED = _KEYED.order_by(TABLE.c.sequence).limit(1)
_KEYED_OF_WORKSPACE = _KEYED.where(TABLE.c.workspace == sa.bindparam("workspace")).order_by(TABLE.c.sequence)
_LAST_DECISION = (
    sa.select(TABLE)
    .where(
        TABLE.c.model == sa.bindparam("model"),
        TABLE.c.version == sa.bindparam("version"),
        TABLE.c.workspace == sa.bindparam("workspace"),
        TABLE.c.event.in_(DECISIONS),
    )
    .order_by(_BACKWARDS)
    .limit(1)
)
_APPENDING = TABLE.insert()


def append(session: Session, entry: LedgerEntry) -> None:
    """Append a row in the session's own transaction.

    Raises:
        sqlalchemy.exc.IntegrityError: Another writer was faster; repeat the whole transaction.
    """
    last = session.execute(_END).one_or_none()
    sequence, previous = (last.sequence + 1, last.digest) if last else (1, GENESIS)
    values = entry.model_dump(mode="json")
    body = rfc8785.dumps(values)
    session.execute(
        _APPENDING,
        {
            "sequence": sequence,
            "workspace": entry.workspace,
            "event": entry.event,
            "model": entry.model,
            "version": entry.version,
            "location_key": _key_in(values),
            "previous": previous,
            "digest": row_digest(previous, body),
            "body": body.decode(),
        },
    )


def row_digest(previous: str, body: bytes) -> str:
    """Hexadecimal SHA-256 over the previous row's digest and this row's body."""
    return hashlib.sha256(previous.encode() + b"\n" + body).hexdigest()


def promotion_at(session: Session, location: str) -> LedgerEntry | None:
    """The last promotion that wrote the locked model at ``location``."""
    return _one(session, _LAST_KEYED, _keyed(location, "promoted"))


def decision_on(session: Session, workspace: str, model: str, version: int) -> LedgerEntry | None:
    """What was decided last about a version, refusals aside."""
    return _one(session, _LAST_DECISION, {"workspace": workspace, "model": model, "version": version})


def last_refusal(
    session: Session, workspace: str, model: str, version: int, target: str
) -> LedgerEntry | None:
    """The last row by which a version was refused what a target stands for."""
    # In canonical JSON nothing but the key itself reads like this: quotes within a text are escaped.
    said = '"target":' + rfc8785.dumps(target).decode()
    of_target = TABLE.c.event == "rejected", TABLE.c.body.contains(said, autoescape=True)
    return _last(session, *_of_version(workspace, model, version), *of_target)


def identity(session: Session) -> str:
    """What tells a ledger from others: the digest of its first row, zeros while it has none."""
    first = session.execute(sa.select(TABLE.c.digest).where(TABLE.c.sequence == 1)).scalar_one_or_none()
    return GENESIS if first is None else str(first)


def writing_of(session: Session, location: str) -> LedgerEntry | None:
    """The last writing of a standalone model at ``location``."""
    return _one(session, _LAST_KEYED, _keyed(location, "written"))


EARLIER = "earlier"
"""Reason in the row of a lock that was found registered past the gate, below others that were on record."""

UNSIGNED = "It is signed by nobody whom the policy names, and the policy wants locks signed."
"""Message in the row of a lock which no promotion applies that wants it signed."""


def locks_of(session: Session, workspace: str, base: str) -> list[LedgerEntry]:
    """Every lock of a base model that was seen in a workspace, once each, in the order of their coming.

    That is the order of their rows; one that was found later than it came stands before those of its
    registered model with higher numbers. One that was signed later keeps its place, and is unsigned no more;
    one of several versions has the lowest of them.
    """
    rows = session.execute(_KEYED_OF_WORKSPACE, {**_keyed(base, "registered"), "workspace": workspace})
    found: list[LedgerEntry] = []
    for entry in map(_entry, rows):
        if entry.lock is None:
            continue
        known = next((place for place, one in enumerate(found) if one.lock_digest == entry.lock_digest), None)
        if known is None:
            found.insert(_place_of(entry.lock, entry.reason, found), entry)
        else:
            found[known] = _with_another_row(found[known], entry)
    return found


def _with_another_row(known: LedgerEntry, entry: LedgerEntry) -> LedgerEntry:
    message = known.message if entry.message == UNSIGNED else entry.message
    return known.model_copy(update={"message": message, "version": min(known.version, entry.version)})


def _place_of(lock: LockInForce, reason: str | None, known: list[LedgerEntry]) -> int:
    if reason != EARLIER:
        return len(known)
    later = (place for place, other in enumerate(known) if other.lock and lock.is_below(other.lock))
    return next(later, len(known))


def locks_not_on_record(session: Session) -> Iterator[LedgerEntry]:
    """Rows for the locks that were applied and have none yet, in the order in which they were applied first.

    A row that was edited says nothing here: it is refused where it is looked up.
    """
    chosen = TABLE.c.event.in_(("registered", *LOCKING))
    rows = session.execute(sa.select(TABLE).where(chosen).order_by(TABLE.c.sequence)).all()
    entries = [entry for row in rows if (entry := _readable(row)) is not None]
    known = {(entry.workspace, entry.lock_digest) for entry in entries if entry.event == "registered"}
    for entry in entries:
        if entry.lock is None or (entry.workspace, entry.lock.digest) in known:
            continue
        known.add((entry.workspace, entry.lock.digest))
        yield LedgerEntry(
            event="registered",
            workspace=entry.workspace,
            model=entry.lock.model,
            version=entry.lock.version,
            target="lock:registered",
            actor=entry.actor,
            message="It was applied before registered locks were put on record.",
            policy=entry.policy,
            lock=entry.lock,
        )


def known_lock(
    session: Session, workspace: str, model: str, version: int, digest: str | None = None
) -> LedgerEntry | None:
    """The last row by which the lock of a version became known.

    With a digest, the row of the lock that has it with its lowest number, whatever others it had.
    """
    if digest is None:
        return _last(session, *_of_version(workspace, model, version), TABLE.c.event == "registered")
    of_model = TABLE.c.model == model, TABLE.c.workspace == workspace, TABLE.c.event == "registered"
    found = (_entry(row) for row in session.execute(_newest_first(*of_model)))
    same = (entry for entry in found if entry.lock_digest == digest)
    return min(same, key=lambda entry: entry.version, default=None)


def revocation_of(session: Session, digest: str) -> LedgerEntry | None:
    """The first revocation of the lock with a digest."""
    return _one(session, _FIRST_KEYED, _keyed(digest, "revoked"))


def preparation_of(session: Session, original: str) -> LedgerEntry | None:
    """The last measuring of the fine-tune at ``original``."""
    return _one(session, _LAST_KEYED, _keyed(original, "prepared"))


def evaluations_of(session: Session, original: str) -> list[LedgerEntry]:
    """Every evaluation on record of the fine-tune at ``original``, newest row first."""
    newest_first = _KEYED.order_by(_BACKWARDS)
    return [_entry(row) for row in session.execute(newest_first, _keyed(original, "evaluated"))]


def last_policy(session: Session) -> str | None:
    """Digest of the policy that came into force last, as far as the ledger knows."""
    entry = _last(session, TABLE.c.event == "policy")
    return None if entry is None else entry.policy


def entries(session: Session) -> Iterator[LedgerEntry]:
    """Every row, oldest first.

    Raises:
        LedgerError: A row's body is not what its digest says.
    """
    for row in session.execute(sa.select(TABLE).order_by(TABLE.c.sequence)):
        yield _entry(row)


def locking_entries(session: Session) -> list[LedgerEntry]:
    """Every row by which a version was locked, oldest first.

    Raises:
        LedgerError: A row's body is not what its digest says.
    """
    chosen = sa.select(TABLE).where(TABLE.c.event.in_(LOCKING)).order_by(TABLE.c.sequence)
    return [_entry(row) for row in session.execute(chosen)]


def last_entries(session: Session, limit: int, model: str | None = None) -> list[tuple[int, LedgerEntry]]:
    """The last rows with their numbers, newest first; of one registered model where it is named.

    Raises:
        LedgerError: A row's body is not what its digest says.
    """
    chosen = sa.select(TABLE).order_by(TABLE.c.sequence.desc()).limit(limit)
    if model is not None:
        chosen = chosen.where(TABLE.c.model == model)
    return [(row.sequence, _entry(row)) for row in session.execute(chosen)]


@dataclass(frozen=True)
class Chain:
    """A ledger whose rows all fit.

    Attributes:
        rows: How many there are.
        head: Digest of the last row, which stands for all of them.
    """

    rows: int
    head: str


def verify_chain(connection: sa.Connection) -> Chain:
    """Walk the whole ledger in order.

    Raises:
        BrokenLedgerError: A row was edited, removed or reordered; it names the first that does not fit.
    """
    rows, head = 0, GENESIS
    streamed = connection.execution_options(yield_per=1000)
    for row in streamed.execute(sa.select(TABLE).order_by(TABLE.c.sequence)):
        rows += 1
        body = row.body.encode()
        if row.sequence != rows:
            raise _broken(rows, f"row {rows} is missing, and the next one is {row.sequence}")
        if row.previous != head:
            raise _broken(rows, "it is not chained to the row before it")
        if row_digest(row.previous, body) != row.digest:
            raise _broken(rows, "its body is not what its digest says")
        try:
            values = json.loads(body)
            said = tuple(values[name] for name in ("workspace", "event", "model", "version"))
            key = _key_in(values)
        except (ValueError, KeyError, TypeError) as error:
            raise _broken(rows, "its body is not one that the gate writes") from error
        if (row.workspace, row.event, row.model, row.version) != said:
            raise _broken(rows, "its columns do not say what its body says")
        if row.location_key != key:
            raise _broken(rows, "it is looked up by something else than its body says")
        head = row.digest
    return Chain(rows, head)


def _broken(sequence: int, what: str) -> BrokenLedgerError:
    return BrokenLedgerError(
        sequence,
        f"The ledger does not hold from row {sequence} on: {what}.",
        next_step="Restore the table from a backup, and find out who can write to the database.",
    )


def _key_in(values: dict[str, Any]) -> str | None:
    """What a row is looked up by: a promotion by its locked model's place, a revocation by its lock.

    A lock that was registered by its base. A measuring and an evaluation by their fine-tune's place, which
    stays when models are renamed or copied.
    """
    if values["event"] == "revoked" and values["lock"]:
        return _key(values["lock"]["digest"])
    if values["event"] == "registered" and values["lock"]:
        return _key(values["lock"]["base_model"])
    about_the_source = values["event"] in ("prepared", "evaluated")
    place = values["original_location" if about_the_source else "location"]
    return _key(place) if place else None


def _keyed(what: str, event: str) -> dict[str, str]:
    return {"key": _key(what), "event": event}


def _of_version(workspace: str, model: str, version: int) -> _Conditions:
    return TABLE.c.model == model, TABLE.c.version == version, TABLE.c.workspace == workspace


def _newest_first(*conditions: sa.ColumnElement[bool]) -> sa.Select[Any]:
    return sa.select(TABLE).where(*conditions).order_by(_BACKWARDS)


def _last(session: Session, *conditions: sa.ColumnElement[bool]) -> LedgerEntry | None:
    return _one(session, _newest_first(*conditions).limit(1), {})


def _one(session: Session, chosen: sa.Select[Any], parameters: Mapping[str, str | int]) -> LedgerEntry | None:
    row = session.execute(chosen, parameters).one_or_none()
    return None if row is None else _entry(row)


def _readable(row: sa.Row[tuple[object, ...]]) -> LedgerEntry | None:
    try:
        return _entry(row)
    except LedgerError as error:
        _logger.warning("%s", error)
        return None


def _entry(row: sa.Row[tuple[object, ...]]) -> LedgerEntry:
    body = row.body.encode()
    if row_digest(row.previous, body) != row.digest:
        raise LedgerError(
            f"Row {row.sequence} of the ledger was edited: its body is not what its digest says.",
            next_step="Restore the table from a backup.",
        )
    try:
        return LedgerEntry.model_validate(json.loads(body), strict=True)
    except ValidationError as error:
        raise LedgerError(f"Row {row.sequence} of the ledger is not one that this version reads.") from error


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
