"""Sweeping the artifact store: locked models that nobody needs, listed and deleted.

Nothing outside the ``…-safelock`` folders beside fine-tunes is looked at. A fine-tune of which no version is
left and that the ledger does not know has nothing that leads to it, so what is beside it is not found.
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
from mlflow_safelock.errors import SafelockError, SourceError
from mlflow_safelock.gate.approval import Request
from mlflow_safelock.gate.leases import Work
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.orphans import Claims, Identity
from mlflow_safelock.gate.ports import LockedFolder, ModelVersion, Target
from mlflow_safelock.gate.promotion import Gate, reconciled_entry
from mlflow_safelock.registry.actor import current_actor

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
    """

    registry_uri: str
    gate: Gate

    def orphans(self) -> tuple[Orphan, ...]:
        """Folders that nobody needs.

        The folders are listed before it is asked who is at work, and that before what is needed: whoever
        wrote one of them is still at work when the second is asked, or is on record by the third, or is gone.

        Raises:
            LedgerError: The database or the ledger cannot be read; then nothing is known to be an orphan.
        """
        place = self.gate.artifacts.place
        versions, locking = self._versions(), self.gate.registry.locking_entries()
        known = [*self._originals(versions, locking).values()]
        known += [entry.original_location for entry in locking if entry.original_location]
        beside = self._listed({place(original): original for original in known})
        held = self.gate.registry.works_held()
        versions, locking = self._versions(), self.gate.registry.locking_entries()
        claims = Claims.of(versions, self._originals(versions, locking), locking, place)
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
        """Delete orphans beside one fine-tune, while nobody promotes or prepares a version of it."""
        try:
            with ExitStack() as until_done:
                for identity in orphans[0].living:
                    for purpose in PURPOSES:
                        until_done.enter_context(self.gate.registry.lease(Work(*identity, purpose)))
                now = {folder.location: folder for folder in self.gate.artifacts.locked_folders(original)}
                same = [one for one in orphans if now.get(one.folder.location) == one.folder]
                self._put_on_record(original, same)
                swept = [
                    self._deleted(orphan) if orphan in same else Swept(orphan, "it was changed meanwhile")
                    for orphan in orphans
                ]
        except SafelockError as error:
            swept = [Swept(orphan, error.cause) for orphan in orphans]
        yield from swept

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
