"""What the gate needs of the registry it guards and of the artifacts behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from mlflow_safelock.apply.checkpoint.progress import Progress
from mlflow_safelock.flavors.standalone import Standalone
from mlflow_safelock.gate.leases import Lease, Work
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.source import HubReference
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import ArtifactReader, SourceFingerprint


@dataclass(frozen=True)
class Target:
    """Where a version is being promoted to: a stage or an alias; or what else is being done."""

    kind: Literal[
        "stage", "alias", "prepare", "read", "evaluate", "sweep", "rename", "unlock", "lock", "policy"
    ]
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


@dataclass(frozen=True)
class ModelVersion:
    """A registered model version, as the gate sees it.

    Attributes:
        name: Registered model.
        version: Its number.
        source: Where it was registered from; never changed by the gate.
        location: Where it is downloaded from now.
        tags: Tags, which anybody can set.
        stage: The stage that it is in; ``None`` as a word where it is in none.
        aliases: The aliases that point to it, sorted.
        model_tags: Tags of the registered model, which anybody can set as well.
        created: When it was registered, in milliseconds since 1970; ``None`` where that is not told.
    """

    name: str
    version: int
    source: str
    location: str
    tags: Mapping[str, str]
    stage: str
    aliases: tuple[str, ...]
    model_tags: Mapping[str, str] = field(default_factory=dict)
    created: int | None = None

    @property
    def is_copy(self) -> bool:
        """Whether what it serves may have been there before it was registered, written for another version.

        The gate redirects a version and leaves its source as it was. MLflow points the source of a copy at
        the version that was copied, and whoever registers a locked model's location has that as the source.
        """
        return self.source == self.location or (
            self.source.startswith("models:/") and "/" in self.source.removeprefix("models:/")
        )


@dataclass(frozen=True)
class Redirection:
    """What one promotion changes in the registry, all of it in one transaction.

    Attributes:
        name: Registered model.
        version: Its number.
        expected_location: Where it is downloaded from before; anything else means that somebody was faster.
        location: Where it is downloaded from afterwards.
        tags: Tags to set.
        entries: Rows for the ledger.
        lease: The lease that ends with it.
        removed_tags: Keys of the tags that are taken off.
        applies: Digest of the lock that it puts in force, which may not be revoked by then; ``None`` where it
            puts none.
        sign: A lease by which others know that this is going on: where it is over by then, nothing is done.
    """

    name: str
    version: int
    expected_location: str
    location: str
    tags: Mapping[str, str]
    entries: tuple[LedgerEntry, ...]
    lease: Lease | None = None
    removed_tags: tuple[str, ...] = ()
    applies: str | None = None
    sign: Lease | None = None


@dataclass(frozen=True)
class Withdrawal:
    """Taking a version out of a stage and aliases, in one transaction.

    Attributes:
        found: The version as it was found; where its stage or location is another by then, nothing is done.
        leaves_stage: Whether it leaves its stage, for none.
        aliases: The aliases that are taken off it.
        entries: Rows for the ledger.
        lease: The lease that ends with it.
    """

    found: ModelVersion
    leaves_stage: bool
    aliases: tuple[str, ...]
    entries: tuple[LedgerEntry, ...]
    lease: Lease | None = None


@dataclass(frozen=True)
class LockedFolder:
    """A folder of a locked model beside its fine-tune, or what is left of one.

    Attributes:
        location: Where it is.
        size: Bytes that would be free without it; those that it shares with others by links are not counted.
        files: How many files it has.
        is_complete: Whether a whole model is there: its MLmodel file is written last.
    """

    location: str
    size: int
    files: int
    is_complete: bool


class Registry(Protocol):
    """The registry that the gate guards."""

    @property
    def has_another_gate(self) -> bool:
        """Whether what it hands out may have been locked by a gate that keeps another ledger."""

    def registered_name(self, name: str) -> str:
        """The name of a registered model as the registry has it; the same where there is no such model.

        A database may take ``BOT`` for ``bot``. Policy, ledger and leases do not, so whoever has a client's
        spelling asks this first.
        """

    def model_version(self, name: str, version: int) -> ModelVersion:
        """One version; MLflow's own error where there is none."""

    def model_versions(self, name: str) -> Sequence[ModelVersion]:
        """All versions of a registered model, oldest first; none where there is no such model."""

    def newest_version(self, name: str) -> ModelVersion | None:
        """The version of a registered model with the highest number; ``None`` where there is none."""

    def as_decided(self, found: ModelVersion, decision: LedgerEntry) -> ModelVersion:
        """A version as it is served where a decision holds, which may be one about a former name of it.

        Where the registry itself is redirected by decisions, that is the version as it is.
        """

    def locks_of(self, workspace: str, base: str) -> Sequence[LedgerEntry]:
        """The rows by which the locks of a base model became known, oldest first."""

    def known_lock(
        self, workspace: str, name: str, version: int, digest: str | None = None
    ) -> LedgerEntry | None:
        """The row by which a registered lock became known, though it be deleted since."""

    def newest_withdrawn(self, name: str) -> int:
        """Number of the newest deleted version of a registered model, as far as that is told; or 0."""

    def ledger_identity(self) -> str:
        """What tells its ledger from others: the digest of the first row, zeros while there is none."""

    def writing_of(self, location: str) -> LedgerEntry | None:
        """The last writing of a standalone model at ``location``; ``None`` where the ledger knows of none."""

    def promotion_at(self, location: str) -> LedgerEntry | None:
        """The promotion that wrote the locked model at ``location``, where the ledger knows one."""

    def decision_on(self, workspace: str, name: str, version: int) -> LedgerEntry | None:
        """What was decided last about a version, refusals aside; ``None`` where nothing was."""

    def is_unlocked(self, workspace: str, name: str, version: int) -> bool:
        """Whether the lock of a version was taken off last, or somebody is at that now."""

    def revocation_of(self, digest: str) -> LedgerEntry | None:
        """The revocation of the lock with a digest; ``None`` where it stands."""

    def preparation_of(self, original: str) -> LedgerEntry | None:
        """The last measuring of the fine-tune at ``original``; ``None`` where there was none."""

    def evaluations_of(self, original: str) -> Sequence[LedgerEntry]:
        """Every evaluation on record of the fine-tune at a place, newest first."""

    def locking_entries(self) -> Sequence[LedgerEntry]:
        """Every row of the ledger by which a version was locked, oldest first."""

    def last_refusal(self, workspace: str, name: str, version: int, target: str) -> LedgerEntry | None:
        """The last row by which a version was refused what a target stands for; ``None``: none was."""

    def works_held(self) -> Sequence[Work]:
        """What somebody is at work on now."""

    def lease(self, work: Work) -> AbstractContextManager[Lease]:
        """Wait until nobody else is at work on a version, and be who is.

        Raises:
            PromotionRefused: Somebody else still was after a long while.
        """

    def redirect(self, redirection: Redirection) -> bool:
        """Do all of it in one transaction, or, where ``expected_location`` no longer holds, nothing.

        Returns:
            Whether it was done.

        Raises:
            PromotionRefused: The lock was revoked meanwhile; nothing was done.
        """

    def withdraw(self, withdrawal: Withdrawal) -> bool:
        """Do all of it in one transaction, or, where the version is not as it was found, nothing.

        Returns:
            Whether it was done.
        """

    def record(self, *entries: LedgerEntry) -> None:
        """Append rows to the ledger, all of them or none."""

    def record_policy(self, entry: LedgerEntry) -> None:
        """Append that a policy came into force, where the last that did is another."""


Writer = Callable[[Path, Path, bool], Standalone]
"""Gets a local folder of the source, an empty one to write into, and whether the first one is complete: all
bytes there, and not only those that a lock's biases are computed from."""


class Artifacts(Protocol):
    """The artifacts behind the registry, reached with the registry's own rights."""

    def resolve(self, uri: str) -> str:
        """The storage URI behind a ``models:/`` or ``runs:/`` URI; any other URI as it is."""

    def reader(self, uri: str) -> ArtifactReader:
        """The folder at ``uri``."""

    def publish(self, folder: Path, uri: str) -> None:
        """Write a local folder to ``uri``."""

    def add_weights_from_hub(self, uri: str, reference: HubReference) -> None:
        """Write the weights of a hub's model into the folder at ``uri``, which refers to it.

        Raises:
            SourceError: They cannot be fetched or written.
        """

    def measure(self, uri: str, progress: Progress) -> SourceFingerprint:
        """Read every byte of the folder at ``uri``; one that was cut off goes on where it was.

        Args:
            uri: The folder.
            progress: Is told how many bytes were read, and of how many.
        """

    def locked_folders(self, original: str) -> Sequence[LockedFolder]:
        """The folders of locked models beside a fine-tune, as far as this package wrote them."""

    def place(self, uri: str) -> str:
        """Where a URI really lies, so that two spellings of one place are the same."""

    def delete_locked_folder(self, location: str) -> None:
        """Delete one of the folders that ``locked_folders`` names, and nothing else."""

    def derive(
        self, original: str, uri: str, lock: SafetyLock, write: Writer, progress: Progress
    ) -> Standalone:
        """Write a standalone model to ``uri`` that shares its weights with the model at ``original``.

        Args:
            original: The fine-tune.
            uri: Where the new model goes; it appears there whole, or not at all.
            lock: The lock, which says what of the weights is needed.
            write: Writes it into an empty local folder.
            progress: Is told how many bytes were moved, and of how many.
        """
