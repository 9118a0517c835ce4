"""Checkpoints of the ledger, signed and kept elsewhere.

The chain shows that a row was edited, removed or reordered, but not that its end was cut off, or that it was
written anew with every digest from some row on, by somebody who can write to the database. Whoever kept a
checkpoint can tell: the ledger must still have that many rows, and the last of them the digest that it had.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Literal

import sqlalchemy as sa
from pydantic import Field, ValidationError

from mlflow_safelock.errors import BrokenLedgerError, VerificationError
from mlflow_safelock.gate.ledger import GENESIS, TABLE, Chain, verify_chain
from mlflow_safelock.lock import NonEmpty
from mlflow_safelock.provenance import Signatory, Signer
from mlflow_safelock.provenance.envelopes import opened, seal
from mlflow_safelock.provenance.statement import Form, Statement

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Checkpoint(Form):
    """What a ledger was at some time.

    Attributes:
        ledger: Digest of its first row, which tells one ledger from another; zeros while it has none.
        database: Where it was, without a password.
        rows: How many rows it had.
        head: Digest of the last of them, which stands for all.
        created: When, ISO 8601 in UTC.
    """

    ledger: Sha256
    database: NonEmpty
    rows: Annotated[int, Field(ge=0)]
    head: Sha256
    created: NonEmpty


class _Subject(Form):
    name: Literal["safelock_ledger"] = "safelock_ledger"
    digest: dict[Literal["sha256"], Sha256]


class _Statement(Statement):
    subject: tuple[_Subject]
    predicate_type: Literal["urn:mlflow-safelock:ledger-checkpoint:v1"] = Field(
        default="urn:mlflow-safelock:ledger-checkpoint:v1", alias="predicateType"
    )
    predicate: Checkpoint


def take_checkpoint(connection: sa.Connection) -> Checkpoint:
    """A checkpoint of a ledger as it is now, once its whole chain holds.

    Raises:
        BrokenLedgerError: It does not.
    """
    chain = verify_chain(connection)
    return Checkpoint(
        ledger=_digest_of(connection, 1) or GENESIS,
        database=connection.engine.url.render_as_string(hide_password=True),
        rows=chain.rows,
        head=chain.head,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def sign_checkpoint(checkpoint: Checkpoint, signer: Signer) -> bytes:
    """A checkpoint as a file: an in-toto statement that is signed.

    Raises:
        SigstoreError: It is to be signed by an identity, and Sigstore cannot be used or refuses.
        UnreachableError: Sigstore does not answer.
    """
    statement = _Statement(subject=(_Subject(digest={"sha256": checkpoint.head}),), predicate=checkpoint)
    return seal(statement.to_bytes(), signer)


def read_checkpoint(data: bytes, signatories: Iterable[Signatory], *, origin: str) -> Checkpoint:
    """Read a checkpoint file; ``origin`` names it in errors.

    Raises:
        VerificationError: None of the signatories signed it, or it is none.
        SigstoreError: An identity may have, and that cannot be verified here.
    """
    payload, _ = opened(data, signatories, origin=origin)
    try:
        statement = _Statement.model_validate_json(payload)
    except ValidationError as error:
        raise VerificationError(
            f"{origin} is soundly signed, and not a checkpoint of a ledger.",
            next_step="Name a file that safelock ledger anchor wrote.",
        ) from error
    return statement.predicate


def verify_against(connection: sa.Connection, checkpoints: Iterable[Checkpoint]) -> Chain:
    """Walk the whole ledger, and compare it with checkpoints of it that were taken earlier.

    Raises:
        BrokenLedgerError: The chain does not hold, its end was cut off, or a row that was there is another.
    """
    chain = verify_chain(connection)
    ledger = _digest_of(connection, 1)
    before: Checkpoint | None = None
    for checkpoint in sorted(checkpoints, key=lambda one: one.rows):
        taken = f"the checkpoint of {checkpoint.created}"
        if checkpoint.rows > chain.rows:
            raise BrokenLedgerError(
                chain.rows + 1,
                f"The ledger's end was cut off: it has {chain.rows} rows, and {taken} says "
                f"{checkpoint.rows}.",
                next_step=_NEXT,
            )
        if checkpoint.rows and _digest_of(connection, checkpoint.rows) != checkpoint.head:
            if ledger != checkpoint.ledger and before is None and checkpoint.rows > 1:
                hint = " Its first row is another one, too, so it may also be one of another ledger."
            else:
                hint = ""
            raise BrokenLedgerError(
                checkpoint.rows,
                f"The ledger was written anew: row {checkpoint.rows} is not what {taken} says that it was, "
                f"so some row from {before.rows + 1 if before else 1} to {checkpoint.rows} is another.{hint}",
                next_step=_NEXT,
            )
        before = checkpoint
    return chain


_NEXT = "Restore the table from a backup, and find out who can write to the database."


def _digest_of(connection: sa.Connection, sequence: int) -> str | None:
    found: str | None = connection.execute(
        sa.select(TABLE.c.digest).where(TABLE.c.sequence == sequence)
    ).scalar_one_or_none()
    return found
