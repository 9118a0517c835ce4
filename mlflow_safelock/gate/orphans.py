"""Which folders of locked models are needed, and by whom: decided from versions, the ledger and leases.

What stays: whatever a living version is downloaded or was registered from; every locked model that the ledger
ever named for a living version, since its receipt is evidence of what ran when; complete standalone models
beside the fine-tune of a living version, which were prepared for a promotion; and everything beside a
fine-tune that somebody is at work on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlflow_safelock.gate.leases import Work
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.places import is_standalone
from mlflow_safelock.gate.ports import LockedFolder, ModelVersion

Identity = tuple[str, str, int]
"""Workspace, registered model and number of a version."""


@dataclass(frozen=True)
class Claims:
    """What of the artifact store is needed.

    Attributes:
        locations: Places of locked models that stay.
        living: The living versions that are made of a fine-tune now, or were locked from it, by its place.
    """

    locations: frozenset[str]
    living: Mapping[str, tuple[Identity, ...]]

    @classmethod
    def of(
        cls,
        versions: Mapping[Identity, ModelVersion],
        originals: Mapping[Identity, str],
        locking: Sequence[LedgerEntry],
        place: Callable[[str], str],
    ) -> Claims:
        """The claims of living versions.

        Args:
            versions: The living versions, of all workspaces.
            originals: Where the fine-tune of each is, as far as that is known.
            locking: The ledger's rows by which versions were locked, oldest first.
            place: Where a URI really lies.
        """
        named = {uri for version in versions.values() for uri in (version.location, version.source)}
        living: dict[str, set[Identity]] = {}
        for identity, original in originals.items():
            living.setdefault(place(original), set()).add(identity)
        lives = _identities(versions, locking)
        for entry in locking:
            if _identity(entry) in lives and entry.location and entry.original_location:
                named.add(entry.location)
                living.setdefault(place(entry.original_location), set()).add(_identity(entry))
        return cls(
            frozenset(place(uri) for uri in named if uri),
            {original: tuple(sorted(identities)) for original, identities in living.items()},
        )

    def why_orphaned(
        self, folder: LockedFolder, place: str, original: str, held: Iterable[Work]
    ) -> str | None:
        """Why nobody needs a folder; ``None`` where somebody does.

        Args:
            folder: The folder.
            place: Where it really lies.
            original: Where the fine-tune beside it really lies.
            held: What somebody is at work on now.
        """
        living = self.living.get(original, ())
        if place in self.locations:
            return None
        if any((work.workspace, work.model, work.version) in living for work in held):
            return None
        if not folder.is_complete:
            return "it was begun and never finished"
        if is_standalone(folder.location) and living:
            return None
        return "no version is served from it, and the ledger names it for none that is there"


def _identity(entry: LedgerEntry) -> Identity:
    return entry.workspace, entry.model, entry.version


def _identities(
    versions: Mapping[Identity, ModelVersion], locking: Sequence[LedgerEntry]
) -> frozenset[Identity]:
    """The living versions under all names that they had: a renamed one is at the place of its promotion."""
    promoted = {entry.location: _identity(entry) for entry in locking if entry.event == "promoted"}
    lives = set(versions) | {
        promoted[version.location] for version in versions.values() if version.location in promoted
    }
    for entry in reversed(locking):
        if _identity(entry) in lives and entry.location in promoted:
            lives.add(promoted[entry.location])
    return frozenset(lives)
