"""Locked models beside their fine-tunes: overlays written in promotions, standalone models before them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import rfc8785

from mlflow_safelock.apply.checkpoint.progress import Progress
from mlflow_safelock.errors import PromotionRefused, SafelockError, VerificationError
from mlflow_safelock.flavors.overlay import read_overlay, write_overlay
from mlflow_safelock.flavors.standalone import (
    Standalone,
    is_complete,
    read_all_of_standalone,
    read_standalone,
    read_unsigned_standalone,
    write_standalone,
)
from mlflow_safelock.gate.approval import Approved
from mlflow_safelock.gate.failpoints import reach
from mlflow_safelock.gate.leases import Work, renewing
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.places import STANDALONE, beside, is_standalone
from mlflow_safelock.gate.policy import GateRule
from mlflow_safelock.gate.ports import Artifacts, Registry
from mlflow_safelock.gate.remembered import holds
from mlflow_safelock.gate.transient import is_transient
from mlflow_safelock.provenance import (
    RECEIPT_SIGNATURE_FILE,
    ArtifactReader,
    Receipt,
    Signer,
    check_fingerprint,
    configured_signer,
    configured_signing_key,
)
from mlflow_safelock.provenance.envelopes import is_sealed_by

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Place:
    """Where the standalone model of a promotion is, or would be written.

    Attributes:
        location: The place.
        receipt: The receipt of the one that is there and on record, checked; ``None`` where none is.
        fault: Why one that is on record cannot be promoted; ``None`` where there is no such one.
    """

    location: str
    receipt: Receipt | None = None
    fault: SafelockError | None = None


@dataclass(frozen=True)
class LockedModels:
    """The locked models beside the fine-tunes that they are made of.

    Attributes:
        registry: The registry, and its ledger.
        artifacts: The artifacts behind it.
    """

    registry: Registry
    artifacts: Artifacts

    def write_overlay(self, approved: Approved) -> tuple[str, Receipt]:
        """Write the overlay of a promotion and read it back; its location and its receipt."""
        with TemporaryDirectory(prefix="safelock-") as temporary:
            folder = Path(temporary)
            receipt = self._overlay_in(folder, approved, configured_signer())
            reach("overlay-written")
            location = _overlay_location(approved, receipt)
            written = {path.name: path.read_bytes() for path in folder.iterdir()}
            self.artifacts.publish(folder, location)
        reach("overlay-published")
        _check_as_written(written, self.artifacts.reader(location))
        reach("overlay-read-back")
        return location, receipt

    def rehearse_overlay(self, approved: Approved) -> tuple[str, Receipt, int]:
        """Write the overlay of a promotion where nobody sees it; where it would go, its receipt and bytes.

        A signature by an identity is left out: it would be put on a log for good.

        Raises:
            PromotionRefused: Its location would be too long.
            SourceError: The fine-tune cannot be read.
        """
        with TemporaryDirectory(prefix="safelock-") as temporary:
            receipt = self._overlay_in(Path(temporary), approved, configured_signing_key())
            location = _overlay_location(approved, receipt)
            size = sum(path.stat().st_size for path in Path(temporary).iterdir())
        return location, receipt, size

    def _overlay_in(self, folder: Path, approved: Approved, signer: Signer | None) -> Receipt:
        return write_overlay(
            folder,
            approved.reader,
            approved.original,
            approved.lock.lock,
            approved.lock_reference,
            approved.alpha,
            approved.promotion,
            fingerprint=approved.measured,
            signer=signer,
            own_biases=approved.rule.own_biases,
        )

    def prepare_standalone(self, approved: Approved, progress: Progress) -> tuple[str, Standalone | None]:
        """Write the standalone model of a promotion where none is on record, read it back, put it on record.

        A whole one that is there stays, whatever it is: a version of this registry or of another one may be
        served from it. Where one is in the way that is not on record, or not as it was written, this goes
        beside it.

        Returns:
            Where it is, and what was written; ``None`` where it was there already.

        Raises:
            PromotionRefused: Somebody else is writing it.
        """
        place = self._standalone_place(approved)
        if place.receipt is not None:
            return place.location, None
        # For whatever place it is: two at a time would write two of them.
        with self.registry.lease(Work.writing(_standalone_at(approved))) as lease:
            place = self._standalone_place(approved)
            if place.receipt is not None:
                return place.location, None
            if place.fault is not None:
                _logger.warning("A standalone model is written anew at %s: %s", place.location, place.fault)
            return place.location, self._write_standalone(approved, place.location, renewing(lease, progress))

    def _write_standalone(self, approved: Approved, location: str, progress: Progress) -> Standalone:
        written = self.artifacts.derive(
            approved.original,
            location,
            approved.lock.lock,
            lambda source, folder, complete: write_standalone(
                folder,
                source,
                self.artifacts.reader(approved.original),
                approved.original,
                approved.lock.lock,
                approved.lock_reference,
                approved.alpha,
                approved.promotion,
                fingerprint=approved.measured,
                complete=complete,
                progress=progress,
            ),
            progress,
        )
        reach("standalone-published")
        receipt = read_all_of_standalone(self.artifacts.reader(location))
        if receipt.digest != written.receipt.digest:
            raise VerificationError(
                f"There is another locked model at {location} than the one that was written.",
                next_step=f"Do it again, which goes beside that one: safelock prepare {approved.uri}.",
            )
        reach("standalone-read-back")
        self.registry.record(
            approved.request.row(
                "written",
                approved.policy,
                lock=approved.lock.in_force,
                alpha=approved.alpha,
                original_location=approved.original,
                location=location,
                receipt=receipt.digest,
            )
        )
        reach("standalone-recorded")
        return written

    def found_prepared(self, approved: Approved) -> tuple[str, Receipt]:
        """The standalone model for a promotion, which was written before: where it is, and its receipt.

        Raises:
            PromotionRefused: There is none.
            VerificationError: The one that is on record is not as it was written, or the fine-tune is not.
            UnreachableError: The store does not answer now.
        """
        place = self._standalone_place(approved)
        write = (
            "where the registry's database and artifacts can be reached: safelock prepare "
            f"{approved.uri}. Then promote again."
        )
        if place.receipt is not None:
            reach("standalone-found")
            return place.location, place.receipt
        if place.fault is not None:
            raise VerificationError(
                place.fault.cause, next_step=f"Have it written anew, {write}"
            ) from place.fault
        raise PromotionRefused(
            "not_prepared",
            f"The policy has {approved.request.name!r} promoted as a standalone model, and none is there "
            f"for version {approved.request.version} with lock {approved.lock.model} version "
            f"{approved.lock.version} at alpha {approved.alpha:g}.",
            next_step=f"Write it, {write}",
        )

    def _standalone_place(self, approved: Approved) -> _Place:
        """Look for the standalone model of a promotion, and where none is, for a place to write it.

        A folder is not believed on its own word: one whose receipt the ledger does not name was not written
        by a preparation, or by one that died before it was put on record.
        """
        fault = None
        for location in self._places(approved):
            reader = self.artifacts.reader(location)
            if not is_complete(reader):
                break
            on_record = self._on_record_at(location)
            if not on_record:
                continue
            try:
                return _Place(location, self._as_written(approved, reader, on_record))
            except SafelockError as error:
                if is_transient(error):
                    raise
                fault = error
        return _Place(location, fault=fault)

    def _places(self, approved: Approved) -> Iterator[str]:
        """The places for the standalone model of a promotion, in order and without end.

        Every ledger has its own, so that nobody writes over what a version of another registry serves. Those
        of earlier versions of this package had no ledger in their name; one that is on record still counts.
        """
        before = _standalone_at(approved)
        if self._on_record_at(before) and is_complete(self.artifacts.reader(before)):
            yield before
        ledger = self.registry.ledger_identity()
        for number in count(1):
            yield _standalone_at(approved, ledger, number)

    def _as_written(
        self, approved: Approved, reader: ArtifactReader, on_record: Collection[str | None]
    ) -> Receipt:
        """The receipt of a standalone model that is as it was written, of what is to be promoted.

        Raises:
            VerificationError: It is not what the ledger names, or not of this source, lock and alpha.
            SourceError: It, or the fine-tune, cannot be read.
        """
        receipt = read_standalone(reader)
        if receipt.digest not in on_record:
            raise VerificationError(
                f"The receipt of the locked model at {reader.location} is not the one that the ledger names."
            )
        stated = receipt.predicate
        wanted = (approved.original, approved.lock.lock.digest, approved.alpha)
        if (stated.source.uri, stated.lock.digest, stated.alpha) != wanted:
            raise VerificationError(
                f"The locked model at {reader.location} is not of the source, lock and alpha that its place "
                "stands for."
            )
        measured = approved.measured
        if measured is not None and not measured.is_of_the_same_bytes(stated.source.fingerprint):
            raise VerificationError(
                f"The locked model at {reader.location} was made of other bytes than were measured."
            )
        check_fingerprint(stated.source.fingerprint, approved.reader)
        return receipt

    def _on_record_at(self, location: str) -> set[str | None]:
        """The receipts that the ledger names for a standalone model's place."""
        rows = self.registry.writing_of(location), self.registry.promotion_at(location)
        return {row.receipt for row in rows if row is not None}

    def check_as_decided(self, decision: LedgerEntry) -> None:
        """Refuse a locked model that is not the one of its promotion; of weights blocks are compared.

        Signatures are for those who do not have the ledger, which names the receipt. A standalone model is
        compared once as long as it is listed the same, which for a file system is believed for a minute.

        Args:
            decision: The row by which a version is locked.

        Raises:
            VerificationError: A file is missing, new or another one, or its receipt is another.
            SourceError: It cannot be read.
        """
        reader = self.artifacts.reader(decision.location or "")
        if is_standalone(decision.location):
            is_decided = holds(
                reader,
                f"receipt {decision.receipt}",
                lambda: read_unsigned_standalone(reader).digest == decision.receipt,
            )
        else:
            is_decided = read_overlay(reader, signature=False).receipt.digest == decision.receipt
        if not is_decided:
            raise VerificationError(
                f"The receipt at {reader.location} is not the one of the promotion.",
                next_step="Promote the version again.",
            )

    def still_stands(self, known: LedgerEntry, rule: GateRule) -> bool:
        """Whether the locked model of an earlier promotion is there as it was written, and as its gate asks.

        Raises:
            PromotionRefused: The fine-tune that it was made of is not what it was.
        """
        try:
            reader = self.artifacts.reader(known.location or "")
            standalone = is_standalone(known.location)
            receipt = read_standalone(reader) if standalone else read_overlay(reader).receipt
        except SafelockError as error:
            _logger.warning("The locked model at %s is written again: %s", known.location, error)
            return False
        if receipt.digest != known.receipt:
            _logger.warning(
                "The locked model at %s has another receipt, and is written again", known.location
            )
            return False
        if not standalone and not _is_signed_as_configured(receipt, reader):
            _logger.warning(
                "The locked model at %s is not signed as it would be now, and is written again",
                known.location,
            )
            return False
        source = receipt.predicate.source
        if rule.fingerprint == "full" and not source.fingerprint.is_full:
            return False
        try:
            check_fingerprint(source.fingerprint, self.artifacts.reader(source.uri))
        except VerificationError as error:
            raise PromotionRefused("source_changed", error.cause, next_step=error.next_step) from error
        return True


def _is_signed_as_configured(receipt: Receipt, there: ArtifactReader) -> bool:
    """Whether a receipt is signed by whoever receipts are signed by now, where they are."""
    signer = configured_signer()
    if signer is None:
        return True
    try:
        return is_sealed_by(there.read(RECEIPT_SIGNATURE_FILE), receipt.to_bytes(), signer)
    except SafelockError:
        return False


def _check_as_written(written: Mapping[str, bytes], there: ArtifactReader) -> None:
    """Refuse unless every file of an overlay, its signature too, is byte for byte what was written."""
    for name, data in written.items():
        if there.read(name) != data:
            raise PromotionRefused(
                "not_written",
                f"The locked model's file {name!r} at {there.location} did not read back as it was written.",
                next_step="Look at the artifact store, then promote again.",
            )


def _overlay_location(approved: Approved, receipt: Receipt) -> str:
    name = receipt.digest.removeprefix("sha256:")[:32]
    return beside(approved.original, name)


def _standalone_at(approved: Approved, *further: str | int) -> str:
    """A place for the standalone model of a source, lock, strength and kind of fingerprint.

    Args:
        approved: The promotion.
        further: What else tells it from others.

    Raises:
        PromotionRefused: It is longer than MLflow's table holds.
    """
    full = ["full"] if approved.rule.fingerprint == "full" else []
    made_of = rfc8785.dumps([approved.original, approved.lock.lock.digest, approved.alpha, *full, *further])
    return beside(approved.original, f"{STANDALONE}{hashlib.sha256(made_of).hexdigest()[:32]}")
