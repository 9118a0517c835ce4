"""Full fingerprints: made before a promotion, since they take every byte, and looked up in it.

The fingerprint lies beside the fine-tune, under its own digest. That it was made, and its digest, is a row of
the ledger, so one that somebody else puts there counts for nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from mlflow_safelock.apply.checkpoint.progress import Progress
from mlflow_safelock.errors import PromotionRefused, SourceError, VerificationError
from mlflow_safelock.gate.approval import Approved
from mlflow_safelock.gate.failpoints import reach
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.places import beside
from mlflow_safelock.gate.ports import Artifacts, Registry, Target
from mlflow_safelock.provenance import SourceFingerprint, check_fingerprint

FINGERPRINT_FILE = "fingerprint.json"

MEASURING = Target("prepare", "fingerprint")
"""What the ledger says a row was for that a measuring led to."""

MEASURED = "manifest-"
"""Beginning of the last part of a full fingerprint's location."""


@dataclass(frozen=True)
class Measured:
    """A full fingerprint.

    Attributes:
        fingerprint: The fingerprint.
        location: Where it lies.
        is_new: Whether it was made just now.
    """

    fingerprint: SourceFingerprint
    location: str
    is_new: bool


@dataclass(frozen=True)
class Measurements:
    """The full fingerprints of fine-tunes.

    Attributes:
        registry: The registry, whose ledger says which were made.
        artifacts: The artifacts behind it.
    """

    registry: Registry
    artifacts: Artifacts

    def required(self, approved: Approved) -> Approved:
        """What is approved, with the full fingerprint where the policy asks for one.

        No more is read for that than the blocks of a sampled one.

        Raises:
            PromotionRefused: None was made, or the fine-tune is not what was measured.
        """
        if approved.rule.fingerprint == "sampled" or approved.measured is not None:
            return approved
        return replace(approved, measured=self._known(approved).fingerprint)

    def make(self, approved: Approved, progress: Progress) -> Measured:
        """Measure a fine-tune and put it on record, unless what is on record still holds.

        It does where the blocks are the same and no file was written since: an edit may hit no block.

        Raises:
            SourceError: The fine-tune cannot be read, or the fingerprint not be written beside it.
            VerificationError: The fine-tune was changed meanwhile.
        """
        try:
            known = self._known(approved)
        except PromotionRefused:
            return self.make_anew(approved, progress)
        entry = self.registry.preparation_of(approved.original)
        if entry is None or self._is_written_since(approved.original, entry):
            return self.make_anew(approved, progress)
        return known

    def _is_written_since(self, original: str, entry: LedgerEntry) -> bool:
        """Whether a file system says that a file was written after it was measured.

        An object store tells by its ETags, which are part of the fingerprint.
        """
        measured = datetime.fromisoformat(entry.time).timestamp()
        files = self.artifacts.reader(original).files()
        return any(file.modified is not None and file.modified / 1e9 > measured for file in files)

    def make_anew(self, approved: Approved, progress: Progress) -> Measured:
        """Measure a fine-tune and put it on record, whatever is there.

        Raises:
            SourceError: The fine-tune cannot be read, or the fingerprint not be written beside it.
            VerificationError: The fine-tune was changed meanwhile.
        """
        fingerprint = self.artifacts.measure(approved.original, progress)
        reach("measured")
        data = fingerprint.to_bytes()
        location = beside(approved.original, MEASURED + fingerprint.digest.removeprefix("sha256:")[:32])
        with TemporaryDirectory(prefix="safelock-") as temporary:
            (Path(temporary) / FINGERPRINT_FILE).write_bytes(data)
            self.artifacts.publish(Path(temporary), location)
        if self.artifacts.reader(location).read(FINGERPRINT_FILE) != data:
            raise SourceError(
                f"The fingerprint at {location} did not read back as it was written.",
                next_step="Look at the artifact store, and do it again.",
            )
        reach("measurement-published")
        self.registry.record(_prepared(approved, fingerprint, location))
        reach("measurement-recorded")
        return Measured(fingerprint, location, is_new=True)

    def _known(self, approved: Approved) -> Measured:
        request = approved.request
        who = f"{request.name!r} version {request.version}"
        prepare = (
            f"Do that where the registry's database and artifacts can be reached: safelock prepare "
            f"{approved.uri}. Then promote again."
        )
        entry = self.registry.preparation_of(approved.original)
        if entry is None or entry.location is None:
            raise PromotionRefused(
                "not_measured",
                f"The policy asks for a full fingerprint, and the fine-tune of {who} was not measured.",
                next_step=prepare,
            )
        try:
            data = self.artifacts.reader(entry.location).read(FINGERPRINT_FILE)
            fingerprint = SourceFingerprint.model_validate_json(data)
        except (SourceError, ValidationError) as error:
            raise PromotionRefused(
                "not_measured",
                f"The fingerprint of {who} at {entry.location} is gone, or cannot be read.",
                next_step=prepare,
            ) from error
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != entry.fingerprint or not fingerprint.is_full:
            raise PromotionRefused(
                "not_measured",
                f"The fingerprint of {who} at {entry.location} is not the one that the ledger names.",
                next_step=prepare,
            )
        try:
            check_fingerprint(fingerprint, approved.reader)
        except VerificationError as error:
            raise PromotionRefused(
                "source_changed", error.cause, next_step=f"{error.next_step} Measure it before: {prepare}"
            ) from error
        return Measured(fingerprint, entry.location, is_new=False)


def _prepared(approved: Approved, fingerprint: SourceFingerprint, location: str) -> LedgerEntry:
    return replace(approved.request, target=MEASURING).row(
        "prepared",
        approved.policy,
        original_location=approved.original,
        location=location,
        fingerprint=fingerprint.digest,
    )
