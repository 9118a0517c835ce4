"""What the audit reports of one registered model version, and how it follows from the evidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlflow_safelock.gate.asked import own_biases_in
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.ports import ModelVersion
from mlflow_safelock.gate.tags import LOCK_TAGS, STATE_TAG, UNLOCKED, Stated
from mlflow_safelock.provenance import Receipt, Signatory

State = Literal["locked", "locked (copy)", "unlocked", "unknown"]
"""Whether a version serves a locked model.

``locked``: a promotion of this version stands behind the model it serves. ``locked (copy)``: it serves the
locked model of another version, and was never promoted itself. ``unlocked``: no promotion is on record for
what it serves. ``unknown``: the evidence cannot be read.
"""

EvidenceKind = Literal["ledger", "receipt", "signed receipt", "none"]
"""What a state rests on.

``ledger``: a row that the registry's own process wrote. ``receipt``: the file in the locked model, which says
what the ledger says but lies where clients may write. ``signed receipt``: that, signed by one of the keys
that ``SAFELOCK_PUBLIC_KEYS`` names, or of the identities in ``SAFELOCK_IDENTITIES``. ``none``: neither is
there.
"""


@dataclass(frozen=True)
class RegisteredVersion:
    """A model version as the registry holds it.

    Attributes:
        workspace: MLflow workspace; ``default`` where workspaces are off.
        name: Registered model.
        version: Its number.
        stage: Current stage, ``None`` as a word where it has none.
        aliases: Aliases that point to it, sorted.
        source: Where it was registered from.
        location: Where it is downloaded from.
        tags: Tags, which anybody can set.
        model_tags: Tags of the registered model, as far as gates of the policy are for them.
    """

    workspace: str
    name: str
    version: int
    stage: str
    aliases: tuple[str, ...]
    source: str
    location: str
    tags: Mapping[str, str]
    model_tags: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name!r} version {self.version}"

    @property
    def as_the_gate_sees_it(self) -> ModelVersion:
        """The version as the gate's own functions take it."""
        return ModelVersion(
            name=self.name,
            version=self.version,
            source=self.source,
            location=self.location,
            tags=self.tags,
            stage=self.stage,
            aliases=self.aliases,
            model_tags=self.model_tags,
        )


@dataclass(frozen=True)
class Evidence:
    """A promotion that is on record for the location that a version is downloaded from.

    Attributes:
        kind: Where it is on record.
        workspace: Workspace of the promoted version; ``None`` where the record does not say.
        model: Registered model that was promoted.
        version: Version that was promoted.
        lock_name: Registered model that the lock was taken from.
        lock_version: Its version there.
        lock_digest: Its content digest.
        base_model: The base model it was made for.
        alpha: Its strength.
        when: When, ISO 8601 in UTC.
        by: Who asked for the promotion.
        verified: Whether MLflow's authentication vouched for them, as far as the record can be believed.
        receipt: Digest of the locked model's receipt.
        kinship: Cosine between the weights of fine-tune and base; ``None`` where it is not known.
        own_biases: Whether biases of the fine-tune's own were compared with the lock's: ``check`` or
            ``ignore``; ``None`` where a receipt does not say, which is so of a standalone model.
    """

    kind: Literal["ledger", "receipt", "signed receipt"]
    workspace: str | None
    model: str
    version: int
    lock_name: str
    lock_version: int
    lock_digest: str
    base_model: str
    alpha: float
    when: str
    by: str
    verified: bool
    receipt: str
    kinship: float | None
    own_biases: str | None

    @classmethod
    def from_ledger(cls, entry: LedgerEntry) -> Evidence:
        """What a ``promoted`` row of the ledger proves."""
        lock, alpha, receipt = entry.lock, entry.alpha, entry.receipt
        if lock is None or alpha is None or receipt is None:
            raise ValueError("only a promotion is evidence")
        return cls(
            kind="ledger",
            workspace=entry.workspace,
            model=entry.model,
            version=entry.version,
            lock_name=lock.model,
            lock_version=lock.version,
            lock_digest=lock.digest,
            base_model=lock.base_model,
            alpha=alpha,
            when=entry.time,
            by=entry.actor.name,
            verified=entry.actor.verified,
            receipt=receipt,
            kinship=entry.kinship,
            own_biases=own_biases_in(entry),
        )

    @classmethod
    def from_receipt(cls, receipt: Receipt, signed_by: Signatory | None = None) -> Evidence:
        """What a promotion's receipt states; where nobody signed it, its actor is only claimed."""
        predicate = receipt.predicate
        promotion, lock = predicate.promotion, predicate.lock
        if promotion is None or lock.model is None or lock.version is None:
            raise ValueError("only a promotion is evidence")
        return cls(
            kind="receipt" if signed_by is None else "signed receipt",
            workspace=None,
            model=promotion.model,
            version=promotion.version,
            lock_name=lock.model,
            lock_version=lock.version,
            lock_digest=lock.digest,
            base_model=lock.base_model,
            alpha=predicate.alpha,
            when=predicate.created,
            by=promotion.actor.name,
            verified=signed_by is not None and promotion.actor.verified,
            receipt=receipt.digest,
            kinship=promotion.kinship,
            own_biases=predicate.own_biases if predicate.carrier == "overlay" else None,
        )

    @property
    def stated(self) -> Stated:
        """What the tags of the promoted version should say."""
        return Stated(
            self.lock_name,
            self.lock_version,
            self.lock_digest,
            self.alpha,
            self.base_model,
            self.kinship,
            self.receipt,
        )

    def is_about(self, version: RegisteredVersion) -> bool:
        """Whether this very version was promoted, under the name it has now."""
        return self._same_workspace(version) and (self.model, self.version) == (version.name, version.version)

    def is_about_former_name_of(self, version: RegisteredVersion) -> bool:
        """Whether this very version was promoted before its model was renamed."""
        is_copy = version.as_the_gate_sees_it.is_copy
        return self._same_workspace(version) and self.version == version.version and not is_copy

    def _same_workspace(self, version: RegisteredVersion) -> bool:
        return self.workspace in (None, version.workspace)


@dataclass(frozen=True)
class AuditRow:
    """One model version in an audit.

    Attributes:
        workspace: MLflow workspace; ``default`` where workspaces are off.
        model: Registered model.
        version: Its number.
        stage: Current stage, ``None`` as a word where it has none.
        aliases: Aliases that point to it, sorted.
        state: Whether it serves a locked model.
        lock_name: Registered model that the lock was taken from; it and all below are ``None`` where no
            promotion is on record.
        lock_version: Version of the lock there.
        lock_digest: Content digest of the lock.
        base_model: Base model that the lock was made for.
        alpha: Strength of the lock.
        when: When it was promoted, ISO 8601 in UTC.
        by: Who asked for the promotion.
        by_verified: Whether MLflow's authentication vouched for them; otherwise the name is only claimed.
        evidence: What the state rests on.
        drift: What does not agree with the evidence, one sentence each.
        violation: Why it may not be where it is: in a gated stage or under a gated alias, and not as the gate
            decided about it, so that the gate hands it to nobody. ``None`` where it may, and where that is
            not told: without a policy, or through a server.
        own_biases: Whether biases of the fine-tune's own were compared with the lock's: ``check`` or
            ``ignore``; ``None`` where no promotion is on record, or by a receipt of a standalone model alone,
            which does not say.
        lock_faults: Why a promotion would not apply the lock that it runs in a gated place any more (revoked,
            below the policy's floor, too old), one sentence each. Empty where that is not told either.
    """

    workspace: str
    model: str
    version: int
    stage: str
    aliases: tuple[str, ...]
    state: State
    lock_name: str | None
    lock_version: int | None
    lock_digest: str | None
    base_model: str | None
    alpha: float | None
    when: str | None
    by: str | None
    by_verified: bool | None
    evidence: EvidenceKind
    drift: tuple[str, ...]
    own_biases: str | None = None
    violation: str | None = None
    lock_faults: tuple[str, ...] = ()

    @property
    def findings(self) -> tuple[str, ...]:
        """What somebody has to do something about."""
        return self.lock_faults if self.violation is None else (self.violation, *self.lock_faults)

    @property
    def notes(self) -> tuple[str, ...]:
        """What somebody should know, and the policy allowed."""
        if self.own_biases != "ignore":
            return ()
        return ("Biases of its own were not compared with the lock's (own_biases: ignore).",)


def row_of(version: RegisteredVersion, evidence: Evidence) -> AuditRow:
    """The row of a version for whose location a promotion is on record."""
    drift = list(_tag_drift(version, evidence))
    state: State = "locked"
    if not evidence.is_about(version):
        promoted = f"{evidence.model!r} version {evidence.version}"
        if evidence.workspace not in (None, version.workspace):
            promoted += f" in workspace {evidence.workspace!r}"
        if evidence.is_about_former_name_of(version):
            drift.insert(0, f"It was promoted as {promoted} and renamed since.")
        else:
            state = "locked (copy)"
            drift.insert(0, f"It serves the locked model of {promoted} and was never promoted itself.")
    return AuditRow(
        workspace=version.workspace,
        model=version.name,
        version=version.version,
        stage=version.stage,
        aliases=version.aliases,
        state=state,
        lock_name=evidence.lock_name,
        lock_version=evidence.lock_version,
        lock_digest=evidence.lock_digest,
        base_model=evidence.base_model,
        alpha=evidence.alpha,
        when=evidence.when,
        by=evidence.by,
        by_verified=evidence.verified,
        evidence=evidence.kind,
        drift=tuple(drift),
        own_biases=evidence.own_biases,
    )


def row_without_evidence(
    version: RegisteredVersion, state: Literal["unlocked", "unknown"] = "unlocked", *drift: str
) -> AuditRow:
    """The row of a version for whose location no promotion is on record, or none that can be read."""
    return AuditRow(
        workspace=version.workspace,
        model=version.name,
        version=version.version,
        stage=version.stage,
        aliases=version.aliases,
        state=state,
        lock_name=None,
        lock_version=None,
        lock_digest=None,
        base_model=None,
        alpha=None,
        when=None,
        by=None,
        by_verified=None,
        evidence="none",
        drift=(*drift, *_claims(version)),
    )


def _claims(version: RegisteredVersion) -> Iterator[str]:
    """What the tags of a version say for which no promotion is on record."""
    state = version.tags.get(STATE_TAG)
    left = [key for key in LOCK_TAGS if key in version.tags]
    if state not in (None, UNLOCKED):
        yield f"The tag {STATE_TAG} says {state!r}, and no promotion is on record."
    elif left:
        yield f"It has tags of a promotion ({', '.join(left)}), and none is on record."


def _tag_drift(version: RegisteredVersion, evidence: Evidence) -> Iterator[str]:
    """Where the tags, which the gate set for people to read, say something else than the evidence."""
    for key, value in evidence.stated.tags.items():
        found = version.tags.get(key)
        if found is None:
            yield f"The tag {key} is missing; the {evidence.kind} says {value!r}."
        elif found != value:
            yield f"The tag {key} says {found!r}, and the {evidence.kind} {value!r}."
