"""Which lock belongs on a fine-tune: the base model it descends from, and that base's newest lock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from mlflow_safelock.errors import LockError, PromotionRefused, SourceError, VerificationError
from mlflow_safelock.flavors.meta_safetylock import LOCK_FILE, lock_model_name
from mlflow_safelock.formats import lock_from_bytes
from mlflow_safelock.gate.ledger import UNSIGNED, LedgerEntry, LockInForce, TokenizerFinding
from mlflow_safelock.gate.policy import GateRule, Policy
from mlflow_safelock.gate.ports import Artifacts, ModelVersion, Registry
from mlflow_safelock.gate.source import BaseHint, LanguageModel
from mlflow_safelock.gate.transient import is_transient, unreadable
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import LOCK_SIGNATURE_FILE, check_lock_signature

BASE_TAG = "safelock.base_model"
"""Tag of a model version that says what it was made from; a hint like any other, checked by geometry."""

KEPT_LOCKS, KEPT_BYTES = 8, 4 << 20
"""How many locks are kept in memory once they were read and found sound, and of which size at most."""


@dataclass(frozen=True)
class RegisteredLock:
    """A lock, where it is registered, and where it is."""

    lock: SafetyLock
    model: str
    version: int
    location: str = ""

    @property
    def title(self) -> str:
        """What to call it."""
        return f"{self.model} version {self.version}"

    @property
    def in_force(self) -> LockInForce:
        """The lock, for the ledger."""
        return LockInForce(
            model=self.model, version=self.version, digest=self.lock.digest, base_model=self.lock.base_model
        )


@dataclass(frozen=True)
class ChosenLock:
    """The lock that belongs on a fine-tune.

    Attributes:
        registered: The lock.
        kinship: Cosine between the fine-tune's weights and those of the lock's base, -1 to 1; ``None`` where
            they cannot be compared.
        hint: Who says that the fine-tune was made from the lock's base.
        tokenizer: Whether the fine-tune's tokenizer has what the lock knows of the base's.
        is_known: Whether the ledger has seen the lock before, and as signed where it must be.
        first_version: The version that it was registered as first.
    """

    registered: RegisteredLock
    kinship: float | None
    hint: BaseHint
    tokenizer: TokenizerFinding
    is_known: bool
    first_version: int


def find_lock(
    workspace: str,
    version: ModelVersion,
    source: LanguageModel,
    policy: Policy,
    rule: GateRule,
    registry: Registry,
    artifacts: Artifacts,
) -> ChosenLock:
    """The newest lock of the fine-tune's base model, sound and of the fine-tune's geometry and descent.

    The policy's word on the base is final. Otherwise the first base decides that the model names and that has
    a lock: a fine-tune of a fine-tune names its parent first.

    Raises:
        PromotionRefused: The base is unknown, or has no lock, one that is gone, one below the policy's floor,
            a damaged one, one for another geometry, or the fine-tune's weights do not descend from it, or its
            tokenizer is another.
        SourceError: The fine-tune's weights cannot be read.
    """
    named = policy.base_of(version.name)
    hints = (BaseHint(named, "bases in the policy"),) if named else tuple(_hints(version, source))
    for hint in hints:
        found = _newest(hint.base, registry, artifacts)
        if found is not None:
            known = registry.locks_of(workspace, hint.base)
            _check(found, hint.base, source, rule, version)
            first = _first_version(found, known)
            _check_the_floor(found, first, rule)
            _check_freshness(found, rule, known, registry)
            if rule.signature.required:
                _check_signature(found, rule, artifacts)
            kinship = _checked_kinship(found, source, rule, version)
            tokenizer = _checked_tokenizer(found, source, rule, version)
            return ChosenLock(found, kinship, hint, tokenizer, _is_known(found, rule, known), first)
        _check_that_none_is_gone(hint.base, workspace, rule, registry)
    if not hints:
        raise PromotionRefused(
            "unknown_base",
            f"{version.name!r} version {version.version} does not say which base model it was made from.",
            next_step=f"Set the tag {BASE_TAG!r} on the version, or name its base in the policy (bases).",
        )
    raise PromotionRefused(
        "missing_lock",
        f"No lock is registered for the base of {version.name!r} version {version.version}: looked for "
        f"{', '.join(repr(hint.base) for hint in hints)}.",
        next_step="Register one: safelock forge, or safelock lock import, then safelock lock register. If "
        f"the base goes by another name, set the tag {BASE_TAG!r} on the version.",
    )


def _hints(version: ModelVersion, source: LanguageModel) -> Iterator[BaseHint]:
    yield from source.hints
    tag = version.tags.get(BASE_TAG)
    if tag and tag not in source.said_bases:
        yield BaseHint(tag, f"the tag {BASE_TAG}")


def _newest(base: str, registry: Registry, artifacts: Artifacts) -> RegisteredLock | None:
    newest = registry.newest_version(lock_model_name(base))
    if newest is None:
        return None
    origin = f"models:/{newest.name}/{newest.version}"
    try:
        lock = _parsed(artifacts.reader(newest.location).read(LOCK_FILE), origin)
    except (LockError, SourceError) as error:
        if is_transient(error):
            raise unreadable(error) from error
        raise PromotionRefused(
            "damaged_lock",
            f"The newest lock of {base!r}, {origin}, is none that can be read: {error.cause}",
            next_step=f"Register a sound lock for {base!r} (safelock lock register), or delete that version.",
        ) from error
    return RegisteredLock(lock, newest.name, newest.version, newest.location)


def _parsed(data: bytes, origin: str) -> SafetyLock:
    """The lock in a file's bytes, which every promotion reads anew and finds the same as the last one did."""
    return _kept(data, origin) if len(data) <= KEPT_BYTES else lock_from_bytes(data, origin=origin)


@lru_cache(maxsize=KEPT_LOCKS)
def _kept(data: bytes, origin: str) -> SafetyLock:
    return lock_from_bytes(data, origin=origin)


def _check(
    found: RegisteredLock, base: str, source: LanguageModel, rule: GateRule, version: ModelVersion
) -> None:
    name = found.title
    if found.lock.base_model != base:
        raise PromotionRefused(
            "damaged_lock",
            f"The lock {name} is for {found.lock.base_model!r}, and it is registered for {base!r}.",
            next_step=f"Register a lock for {base!r}: safelock lock register.",
        )
    if source.geometry is not None and found.lock.geometry != source.geometry:
        raise PromotionRefused(
            "geometry_mismatch",
            f"The lock {name} is for {found.lock.geometry}, and {version.name!r} version {version.version} "
            f"has {source.geometry}.",
            next_step=_ANOTHER_BASE,
        )
    misfit = source.adapter.misfit(found.lock) if source.adapter is not None else ""
    if misfit:
        raise PromotionRefused(
            "geometry_mismatch",
            f"The lock {name} is for {found.lock.geometry}, and the adapter {version.name!r} version "
            f"{version.version} was trained on another shape: {misfit}.",
            next_step=_ANOTHER_BASE,
        )


def _is_known(found: RegisteredLock, rule: GateRule, known: Sequence[LedgerEntry]) -> bool:
    """Whether a lock is on record; one that is there as unsigned is not where its signature was just seen."""
    seen = [entry for entry in known if entry.lock_digest == found.lock.digest]
    return any(not rule.signature.required or entry.message != UNSIGNED for entry in seen)


def _check_the_floor(found: RegisteredLock, first: int, rule: GateRule) -> None:
    """Refuse a lock below the policy's floor by the number that it had first, whatever others it got since.

    Raises:
        PromotionRefused: It is.
    """
    if first >= rule.lock.min_version:
        return
    was = "" if first == found.version else f", which was registered as version {first} first"
    raise PromotionRefused(
        "lock_too_old",
        f"The newest lock is {found.title}{was}, and the policy asks for version {rule.lock.min_version} or "
        "later.",
        next_step="Register a newer lock: safelock lock register.",
    )


def _first_version(found: RegisteredLock, known: Sequence[LedgerEntry]) -> int:
    """The version that a lock was registered as first, as far as the ledger tells."""
    same = (entry for entry in known if entry.lock_digest == found.lock.digest)
    return min([found.version, *(entry.version for entry in same)])


_ANOTHER_BASE = "It does not descend from that base: correct its base, or register a lock for its own."


def _digests(known: Sequence[LedgerEntry]) -> list[str]:
    """The digests of locks on record, in the order of their coming."""
    return [entry.lock.digest for entry in known if entry.lock is not None]


def check_moves_forward(
    lock: SafetyLock,
    title: str,
    known: Sequence[LedgerEntry],
    registry: Registry,
    *,
    signed_only: bool,
) -> None:
    """Refuse a lock after which another one of its base came, unless that one was revoked.

    What counts is the order in which locks came, whatever their versions are called: an older one that is
    registered anew, or that is left when a newer one is deleted, is the older one still.

    Args:
        lock: The lock.
        title: What to call it.
        known: The rows of its base's locks, oldest first.
        registry: The registry.
        signed_only: Whether one that is known to be unsigned supersedes none, since it is not applied either.

    Raises:
        PromotionRefused: Another one came after it.
    """
    digests = _digests(known)
    if lock.digest not in digests:
        return
    for entry in reversed(known[digests.index(lock.digest) + 1 :]):
        later = entry.lock
        if later is None or (signed_only and entry.message == UNSIGNED):
            continue
        if registry.revocation_of(later.digest) is not None:
            continue
        raise PromotionRefused(
            "lock_superseded",
            f"The lock {title} was superseded by {later.model} version {later.version} at {entry.time}, and "
            "an older one does not take its place.",
            next_step="Register the newer one, or a new one (safelock lock register); or put on record that "
            f"the newer one is no good: {_revoking(later)}.",
        )


def _revoking(lock: LockInForce) -> str:
    """The command that puts on record that a lock is not to be applied."""
    return f"safelock lock revoke models:/{lock.model}/{lock.version} --digest {lock.digest} --reason '…'"


def _check_that_none_was_newer(
    found: RegisteredLock, known: Sequence[LedgerEntry], registry: Registry
) -> None:
    """Refuse a lock that is not on record and has a lower number than one that was.

    Raises:
        PromotionRefused: A newer one was, and is gone.
    """
    numbers = [
        entry.lock.version
        for entry in known
        if entry.lock is not None
        and entry.lock.model == found.model
        and registry.revocation_of(entry.lock.digest) is None
    ]
    if max([*numbers, registry.newest_withdrawn(found.model)]) > found.version:
        raise PromotionRefused(
            "lock_superseded",
            f"The lock {found.title} was registered past the gate, and a newer version of {found.model} was "
            "there and is gone.",
            next_step="Register a newer one through the gate: safelock lock register.",
        )


def _check_that_none_is_gone(base: str, workspace: str, rule: GateRule, registry: Registry) -> None:
    """Refuse to take a base for one without a lock whose lock is deleted, and was not revoked.

    Raises:
        PromotionRefused: There was one.
    """
    for entry in reversed(registry.locks_of(workspace, base)):
        gone = entry.lock
        if rule.signature.required and entry.message == UNSIGNED:
            continue  # no gate applied it that wants locks signed
        if gone is None or registry.revocation_of(gone.digest) is not None:
            continue
        raise PromotionRefused(
            "lock_gone",
            f"No lock is registered for {base!r} any more, and {gone.model} version {gone.version}, which "
            f"came at {entry.time}, was not revoked.",
            next_step="Register it again, or a new one (safelock lock register); or put on record that it is "
            f"no good: {_revoking(gone)}.",
        )


def _check_freshness(
    found: RegisteredLock, rule: GateRule, known: Sequence[LedgerEntry], registry: Registry
) -> None:
    """Locks of a base only move forward; none is applied that was revoked, or is older than allowed."""
    if found.lock.digest in _digests(known):
        signed_only = rule.signature.required
        check_moves_forward(found.lock, found.title, known, registry, signed_only=signed_only)
    else:
        _check_that_none_was_newer(found, known, registry)
    revoked = registry.revocation_of(found.lock.digest)
    if revoked is not None:
        raise PromotionRefused(
            "lock_revoked",
            f"The lock {found.title} was revoked at {revoked.time}: {revoked.message}",
            next_step="Register another lock for this base: safelock forge, then safelock lock register.",
        )
    allowed, created = rule.lock.max_age_days, found.lock.metadata.created
    if allowed is None:
        return
    age = None if created is None else datetime.now(UTC) - datetime.fromisoformat(created)
    # A clock may be a little fast; a date in the future would never become old.
    if age is None or not timedelta(minutes=-10) <= age <= timedelta(days=allowed):
        raise PromotionRefused(
            "lock_expired",
            f"The lock {found.title} was made {created or 'at a time that it does not say'}, and the policy "
            f"takes none older than {allowed} days.",
            next_step="Forge a new one and register it: safelock forge, then safelock lock register.",
        )


def _check_signature(found: RegisteredLock, rule: GateRule, artifacts: Artifacts) -> None:
    """Refuse a lock that nobody signed whom the policy names.

    Raises:
        PromotionRefused: It is not signed, or by none of them.
        SigstoreError: The policy names identities, and no signature of one can be verified here.
    """
    reader = artifacts.reader(found.location)
    how = "--key …" if rule.signature.keys else "--sigstore"
    sign = (
        f"Sign it, which registers it anew: safelock lock sign models:/{found.model}/{found.version} {how}. "
        f"If it is not to be applied: {_revoking(found.in_force)}; then delete that version."
    )
    if LOCK_SIGNATURE_FILE not in {file.path for file in reader.files()}:
        raise PromotionRefused(
            "unsigned_lock",
            f"The lock {found.title} is not signed, and the policy wants it to be.",
            next_step=sign,
        )
    try:
        check_lock_signature(
            reader.read(LOCK_SIGNATURE_FILE),
            found.lock,
            rule.signature.signatories,
            origin=f"The signature of {found.title}",
        )
    except VerificationError as error:
        raise PromotionRefused("bad_signature", error.cause, next_step=sign) from error


def _checked_kinship(
    found: RegisteredLock, source: LanguageModel, rule: GateRule, version: ModelVersion
) -> float | None:
    sketch, kinship = found.lock.sketch, None
    if sketch is not None and source.weights is not None and source.architecture is not None:
        kinship = source.weights.kinship(sketch, source.architecture)
    who = f"{version.name!r} version {version.version}"
    if kinship is None and rule.kinship.unknown == "reject":
        why = (
            f"the lock {found.title} holds no sketch of it"
            if sketch is None
            else "it is an adapter alone"
            if source.weights is None
            else "its weights are quantised"
        )
        raise PromotionRefused(
            "kinship_unknown",
            f"Whether {who} descends from {found.lock.base_model!r} cannot be told: {why}.",
            next_step="Give the lock a sketch (safelock lock enroll), log the fine-tune merged and not "
            "quantised, or set 'kinship: {unknown: allow}' in the policy's gate for it.",
        )
    if kinship is not None and kinship < rule.kinship.min_cosine:
        raise PromotionRefused(
            "not_a_descendant",
            f"{who} does not descend from {found.lock.base_model!r}: the cosine between the weights of both "
            f"is {kinship:.3f}, and the policy asks for {rule.kinship.min_cosine:g}.",
            next_step=f"Name the base that it was made from: the tag {BASE_TAG!r}, or 'bases' in the policy.",
        )
    return kinship


def _checked_tokenizer(
    found: RegisteredLock, source: LanguageModel, rule: GateRule, version: ModelVersion
) -> TokenizerFinding:
    if rule.tokenizer == "ignore":
        return "ignored"
    base, who = found.lock.metadata.tokenizer, f"{version.name!r} version {version.version}"
    same = None if base is None or source.tokenizer is None else source.tokenizer.extends(base)
    if same is None:
        if rule.tokenizer == "require":
            why = (
                f"the lock {found.title} holds no digest of it" if base is None else "its own cannot be read"
            )
            raise PromotionRefused(
                "tokenizer_unknown",
                f"Whether {who} has the tokenizer of {found.lock.base_model!r} cannot be told: {why}.",
                next_step="Give the lock one (safelock lock enroll), log the fine-tune with a "
                "tokenizer.json, or set 'tokenizer: check' in the policy's gate for it.",
            )
        return "unknown"
    if not same:
        raise PromotionRefused(
            "other_tokenizer",
            f"{who} has another tokenizer than {found.lock.base_model!r}: tokens of the base's vocabulary "
            "have other numbers there, are missing, or are merged in another order.",
            next_step=f"Name the base that it was made from: the tag {BASE_TAG!r}, or 'bases' in the policy. "
            "If it got another vocabulary on purpose, set 'tokenizer: ignore' in the policy's gate for it.",
        )
    return "same"
