"""What a promotion will apply: the source (never a locked one), the base's lock, and the strength."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlflow_safelock.errors import PromotionRefused
from mlflow_safelock.gate.effect import checked_effect
from mlflow_safelock.gate.ledger import Event, LedgerEntry, TokenizerFinding
from mlflow_safelock.gate.locked_elsewhere import original_by_receipt
from mlflow_safelock.gate.locks import RegisteredLock, find_lock
from mlflow_safelock.gate.own_biases import check_own_biases
from mlflow_safelock.gate.permissions import require
from mlflow_safelock.gate.policy import GateRule, Policy
from mlflow_safelock.gate.ports import Artifacts, ModelVersion, Registry, Target
from mlflow_safelock.gate.source import PROMPT_SOURCE, PROMPT_TAG, BaseHint, examine, hub_reference
from mlflow_safelock.gate.strength import alpha_for
from mlflow_safelock.provenance import (
    Actor,
    ArtifactFile,
    ArtifactReader,
    ListedArtifacts,
    LockReference,
    Promotion,
    SourceFingerprint,
)
from mlflow_safelock.provenance.fingerprint import ADDED_BY_CLIENTS

Listing = tuple[tuple[ArtifactFile, int | None, int | None], ...]
"""The files of a folder, and when each was written and changed last, where the store tells."""


@dataclass(frozen=True)
class Request:
    """A promotion that somebody asked for.

    Attributes:
        name: Registered model.
        version: Its version.
        target: Where it goes.
        actor: Who asked.
        workspace: MLflow workspace.
        found: What a repair found that asks for it; ``None`` where a client asks.
    """

    name: str
    version: int
    target: Target
    actor: Actor
    workspace: str
    found: str | None = None

    def row(self, event: Event, policy: Policy, **what: Any) -> LedgerEntry:
        """The ledger's row for what becomes of this request now.

        Args:
            event: What becomes of it.
            policy: The policy in force.
            what: Further columns of the row.
        """
        return LedgerEntry(
            event=event,
            workspace=self.workspace,
            model=self.name,
            version=self.version,
            target=str(self.target),
            actor=self.actor,
            policy=policy.digest,
            **what,
        )


@dataclass(frozen=True)
class Approved:
    """What a promotion will apply, and onto what; everything that the policy asks for was found in order.

    Attributes:
        request: The promotion.
        policy: The policy in force.
        rule: Its gate for the version.
        found: The version as the registry has it.
        original: Where its fine-tune is.
        lock: The lock.
        kinship: Cosine between the weights of fine-tune and base; ``None`` where it is not known.
        alpha: Its strength.
        hint: Who says what the base is.
        tokenizer: Whether the fine-tune's tokenizer is its base's.
        reader: The fine-tune's artifacts, as they were examined.
        listing: How they were listed before that.
        evaluations: Digests of the evaluations that it rests on, once the policy's were found.
        measured: The fine-tune's full fingerprint, where the policy asks for one and it was found to hold.
        is_known: Whether the ledger has seen the lock before, and as signed where it must be.
        first_version: The version that the lock was registered as first.
    """

    request: Request
    policy: Policy
    rule: GateRule
    found: ModelVersion
    original: str
    lock: RegisteredLock
    kinship: float | None
    alpha: float
    hint: BaseHint
    tokenizer: TokenizerFinding
    reader: ArtifactReader
    listing: Listing
    evaluations: tuple[str, ...] = ()
    measured: SourceFingerprint | None = None
    is_known: bool = True
    first_version: int | None = None

    def check_unchanged(self) -> None:
        """Refuse what was written over since it was examined, where the store tells when that was.

        Raises:
            PromotionRefused: It was.
        """
        if listing_of(self.reader) != self.listing:
            raise changed_meanwhile(self.request)

    @property
    def was_touched(self) -> bool:
        """Whether files were changed since in something that may be other than their bytes, such as links."""
        now = listing_of(self.reader)
        return now != self.listing and [it[:2] for it in now] == [it[:2] for it in self.listing]

    @property
    def uri(self) -> str:
        """The version's address in the registry."""
        return f"models:/{self.request.name}/{self.request.version}"

    @property
    def lock_reference(self) -> LockReference:
        """The lock, for receipts."""
        return LockReference(
            digest=self.lock.lock.digest,
            base_model=self.lock.lock.base_model,
            model=self.lock.model,
            version=self.lock.version,
        )

    @property
    def promotion(self) -> Promotion:
        """The decision, for receipts."""
        return Promotion(
            model=self.request.name,
            version=self.request.version,
            target=str(self.request.target),
            policy=self.policy.digest,
            actor=self.request.actor,
            kinship=None if self.kinship is None else round(self.kinship, 6),
            evaluations=self.evaluations,
        )


def approve(
    request: Request,
    policy: Policy,
    rule: GateRule,
    found: ModelVersion,
    registry: Registry,
    artifacts: Artifacts,
) -> Approved | None:
    """Decide what is to be applied to a version; nothing is written.

    Args:
        request: The promotion.
        policy: The policy in force.
        rule: Its gate for the version.
        found: The version as the registry has it.
        registry: The registry.
        artifacts: The artifacts behind it.

    Returns:
        ``None`` where nothing is to be applied: it is no language model, and the policy lets those through.

    Raises:
        PromotionRefused: The version may not be promoted.
        SourceError: Its artifacts cannot be read.
    """
    original = original_of(found, registry, artifacts)
    reader = artifacts.reader(original)
    listing = () if is_prompt(found) else listing_of(reader)
    listed = ListedArtifacts(reader)
    if rule.no_weights == "snapshot" and not is_prompt(found):
        reference = hub_reference(listed)
        if reference is not None:
            raise PromotionRefused(
                "no_weights",
                f"{request.name!r} version {request.version} was logged as a reference to {reference}, "
                "without weights, and the policy has them fetched before the promotion.",
                next_step=f"Do that where the registry's database can be reached: safelock prepare "
                f"models:/{request.name}/{request.version}. Then promote again.",
            )
    source = None if is_prompt(found) else examine(listed)
    if source is None:
        if rule.not_an_llm == "reject":
            raise PromotionRefused(
                "not_an_llm",
                f"{request.name!r} version {request.version} is no language model, and the policy lets "
                "only locked language models through.",
                next_step="Set 'not_an_llm: allow' in the policy's gate for it.",
            )
        return None
    chosen = find_lock(request.workspace, found, source, policy, rule, registry, artifacts)
    alpha = _permitted_alpha(request, policy, rule, found)
    arriving = checked_effect(source, chosen.registered.lock, alpha)
    if rule.own_biases == "check":
        check_own_biases(source, chosen.registered.lock, alpha, arriving)
    return Approved(
        request,
        policy,
        rule,
        found,
        original,
        chosen.registered,
        chosen.kinship,
        alpha,
        chosen.hint,
        chosen.tokenizer,
        reader,
        listing,
        is_known=chosen.is_known,
        first_version=chosen.first_version,
    )


def _permitted_alpha(request: Request, policy: Policy, rule: GateRule, found: ModelVersion) -> float:
    """The strength, where who promotes may have it; what is prepared or measured is not in force yet."""
    alpha = alpha_for(found, rule)
    if alpha != rule.alpha.default and request.target.kind in ("stage", "alias"):
        what = f"promote with another alpha than {rule.alpha.default:g} (the version asks for {alpha:g})"
        require(policy.other_alpha, request.actor, "alpha_denied", what, "other_alpha")
    return alpha


def listing_of(reader: ArtifactReader) -> Listing:
    """The files of a fine-tune, with all that tells whether their bytes were written anew."""
    files = (file for file in reader.files() if file.path not in ADDED_BY_CLIENTS)
    return tuple((file, file.modified, file.changed) for file in files)


def changed_meanwhile(request: Request) -> PromotionRefused:
    """The refusal of whoever was slower."""
    return PromotionRefused(
        "conflict",
        f"{request.name!r} version {request.version} was changed by another request meanwhile.",
        next_step="Look at the version, then do it again.",
    )


def is_prompt(found: ModelVersion) -> bool:
    """Whether a version is a prompt of MLflow's: registered like a model, with nothing to load."""
    return found.source == found.location == PROMPT_SOURCE and PROMPT_TAG in found.model_tags


def original_of(found: ModelVersion, registry: Registry, artifacts: Artifacts) -> str:
    """Where the fine-tune of a version is; of one that serves a locked model, what that was made of.

    Raises:
        SourceError: That cannot be told.
        VerificationError: It serves what another gate wrote, and that is not what its receipt says.
    """
    known = registry.promotion_at(found.location)
    original = artifacts.resolve((known and known.original_location) or found.location)
    if known is None and registry.has_another_gate:
        return original_by_receipt(original, artifacts) or original
    return original
