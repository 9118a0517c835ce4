"""Sweeping the artifact store: locked models that nobody needs, listed and deleted.

Nothing outside the ``…-safelock`` folders beside fine-tunes is looked at. A fine-tune of which no version is
left and that the ledger does not know has nothing that leads to it, so what is beside it is not found.

What clients with a ledger of their own wrote is in no row here. They tag what they promote, so a version with
the tags of a promotion that no ledger knows stops a sweep: everything of theirs would seem to be nobody's.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from mlflow.utils.workspace_utils import DEFAULT_WORKSPACE_NAME

from mlflow_safelock.audit.database import registered_versions
from mlflow_safelock.errors import LedgerError, SafelockError, SourceError
from mlflow_safelock.gate.approval import Request
from mlflow_safelock.gate.leases import Work
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.orphans import Claims, Identity
from mlflow_safelock.gate.ports import LockedFolder, ModelVersion, Registry, Target
from mlflow_safelock.gate.promotion import Gate
from mlflow_safelock.gate.promotion_rows import reconciled_entry
from mlflow_safelock.gate.tags import RECEIPT_TAG
from mlflow_safelock.registry.actor import current_actor
from mlflow_safelock.registry.sql_ledger import SqlLedger

_logger = logging.getLogger(__name__)

LISTED_AT_ONCE = 8
"""How many folders are listed at once."""

PURPOSES: tuple[Literal["promote", "prepare"], ...] = ("promote", "prepare")


@dataclass(frozen=True)
class Orphan:
    """A folder of a locked model that nobody needs.

    Attributes:
        folder: The folder.
        original: The fine-tune that it is beside.
        why: Why nobody needs it.
        living: Versions of that fine-tune.
    """

    folder: LockedFolder
    original: str
    why: str
    living: tuple[Identity, ...]


@dataclass(frozen=True)
class Swept:
    """What became of an orphan.

    Attributes:
        orphan: The orphan.
        kept: Why it was not deleted; ``None`` where it was.
    """

    orphan: Orphan
    kept: str | None = None


@dataclass(frozen=True)
class Sweeping:
    """Finds orphans beside the fine-tunes of one registry, and deletes them.

    Attributes:
        registry_uri: Its database.
        gate: Its gate.
        clients: The ledgers of clients that guard the registry by themselves.
        only_known: Whether there are no others, whatever tags say.
    """

    registry_uri: str
    gate: Gate
    clients: tuple[SqlLedger, ...] = ()
    only_known: bool = False

    def orphans(self) -> tuple[Orphan, ...]:
        """Folders that nobody needs.

        The folders are listed before it is asked who is at work, and that before what is needed: whoever
        wrote one of them is still at work when the second is asked, or is on record by the third, or is gone.

        Raises:
            LedgerError: The database or a ledger cannot be read, or there is another ledger; then nothing is
                known to be an orphan.
        """
        place = self.gate.artifacts.place
        versions, locking = self._versions(), self._locking()
        self._refuse_other_ledgers(versions, locking)
        known = [*self._originals(versions, locking).values()]
        known += [entry.original_location for entry in locking if entry.original_location]
        beside = self._listed({place(original): original for original in known})
        held, claims = self._works_held(), self._claims()
        found = []
        for original, folders in beside.items():
            at = place(original)
            for folder in folders:
                why = claims.why_orphaned(folder, place(folder.location), at, held)
                if why is not None:
                    found.append(Orphan(folder, original, why, claims.living.get(at, ())))
        return tuple(found)

    def delete(self, listed: Collection[Orphan]) -> Iterator[Swept]:
        """Delete orphans that were listed and still are some, once a row of the ledger says so."""
        still = {orphan.folder.location: orphan for orphan in self.orphans()}
        beside: dict[str, list[Orphan]] = {}
        for orphan in listed:
            if orphan.folder.location in still:
                beside.setdefault(orphan.original, []).append(still[orphan.folder.location])
            else:
                yield Swept(orphan, "it is needed by now, or gone")
        for original, orphans in beside.items():
            yield from self._delete_beside(original, orphans)

    def _delete_beside(self, original: str, orphans: Sequence[Orphan]) -> Iterator[Swept]:
        """Delete orphans beside one fine-tune, while nobody promotes or prepares a version of it.

        Whether they still are some is asked once more under the leases: to come here may have taken long.
        """
        try:
            with ExitStack() as until_done:
                mine = [Work(*identity, purpose) for identity in orphans[0].living for purpose in PURPOSES]
                leases = [
                    until_done.enter_context(ledger.lease(work)) for ledger in self._ledgers for work in mine
                ]
                kept = self._kept(original, orphans, mine)
                self._put_on_record(original, [orphan for orphan in orphans if orphan not in kept])
                swept = []
                for orphan in orphans:
                    for lease in leases:
                        lease.renew()  # a folder with many files takes long to delete
                    swept.append(Swept(orphan, kept[orphan]) if orphan in kept else self._deleted(orphan))
        except SafelockError as error:
            swept = [Swept(orphan, error.cause) for orphan in orphans]
        yield from swept

    def _kept(self, original: str, orphans: Sequence[Orphan], mine: Collection[Work]) -> dict[Orphan, str]:
        """The orphans that are none any more, and why; ``mine`` is what is being worked on for this."""
        place = self.gate.artifacts.place
        now = {folder.location: folder for folder in self.gate.artifacts.locked_folders(original)}
        held = [work for work in self._works_held() if work not in mine]
        claims, at = self._claims(), place(original)
        kept: dict[Orphan, str] = {}
        for orphan in orphans:
            folder = orphan.folder
            if now.get(folder.location) != folder:
                kept[orphan] = "it was changed meanwhile"
            elif claims.why_orphaned(folder, place(folder.location), at, held) is None:
                kept[orphan] = "it is needed by now"
            elif set(claims.living.get(at, ())) - set(orphans[0].living):
                kept[orphan] = "another version is made of its fine-tune meanwhile"
        return kept

    def _deleted(self, orphan: Orphan) -> Swept:
        try:
            self.gate.artifacts.delete_locked_folder(orphan.folder.location)
        except SourceError as error:
            return Swept(orphan, error.cause)
        return Swept(orphan)

    def _put_on_record(self, original: str, orphans: Sequence[Orphan]) -> None:
        if not orphans:
            return
        what = "; ".join(f"{orphan.folder.location} ({orphan.why})" for orphan in orphans)
        request = Request("*", 0, Target("sweep", "artifacts"), current_actor(), DEFAULT_WORKSPACE_NAME)
        entry = reconciled_entry(request, self.gate.policy(), "swept", f"Beside {original} go {what}.")
        self.gate.registry.record(entry)

    @property
    def _ledgers(self) -> tuple[Registry | SqlLedger, ...]:
        return (self.gate.registry, *self.clients)

    def _locking(self) -> list[LedgerEntry]:
        return [entry for ledger in self._ledgers for entry in ledger.locking_entries()]

    def _works_held(self) -> list[Work]:
        return [work for ledger in self._ledgers for work in ledger.works_held()]

    def _claims(self) -> Claims:
        """What is needed by what is there now."""
        versions, locking = self._versions(), self._locking()
        return Claims.of(versions, self._originals(versions, locking), locking, self.gate.artifacts.place)

    def _refuse_other_ledgers(
        self, versions: Mapping[Identity, ModelVersion], locking: Sequence[LedgerEntry]
    ) -> None:
        """Refuse where tags tell of a promotion that is in no ledger that is known here."""
        known = {entry.receipt for entry in locking}
        for (_, name, number), version in versions.items():
            receipt = version.tags.get(RECEIPT_TAG, "")
            if receipt.startswith("sha256:") and receipt not in known and not self.only_known:
                raise LedgerError(
                    f"{name!r} version {number} has the tags of a promotion that is in no ledger known here: "
                    "clients may guard this registry with a ledger of their own, and what they wrote would "
                    "be taken for orphans.",
                    next_step="Name their ledger: --ledger URI. If there is none, and the tags are made up "
                    "or left over: --only-this-ledger.",
                )

    def _versions(self) -> dict[Identity, ModelVersion]:
        return {
            (version.workspace, version.name, version.version): version.as_the_gate_sees_it
            for version in registered_versions(self.registry_uri)
        }

    def _originals(
        self, versions: Mapping[Identity, ModelVersion], locking: Sequence[LedgerEntry]
    ) -> dict[Identity, str]:
        """Where the fine-tune of each version is; of one that is served locked, what that was made of."""
        made_of = {entry.location: entry.original_location for entry in locking}
        found: dict[Identity, str] = {}
        for identity, version in versions.items():
            try:
                found[identity] = self.gate.artifacts.resolve(
                    made_of.get(version.location) or version.location
                )
            except SourceError as error:
                _logger.warning("Nothing is swept beside %s version %s: %s", *identity[1:], error)
        return found

    def _listed(self, originals: Mapping[str, str]) -> dict[str, Sequence[LockedFolder]]:
        """The folders beside each fine-tune; of one that cannot be listed, none."""

        def look(original: str) -> Sequence[LockedFolder]:
            try:
                return self.gate.artifacts.locked_folders(original)
            except SourceError as error:
                _logger.warning("Nothing is swept beside %s: %s", original, error)
                return ()

        with ThreadPoolExecutor(LISTED_AT_ONCE, thread_name_prefix="safelock-sweep") as pool:
            return dict(zip(originals.values(), pool.map(look, originals.values()), strict=True))
