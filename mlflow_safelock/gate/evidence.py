"""What counts as evidence: which evaluations are of a promotion, who must sign them, and what they may find.

Here nothing is read or written; ``gate.evaluations`` puts evaluations on record, and finds them again.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from mlflow_safelock.errors import PromotionRefused, VerificationError
from mlflow_safelock.evaluate.forge_data import pairs_of
from mlflow_safelock.evaluate.suites import SHIPPED
from mlflow_safelock.gate.approval import Approved
from mlflow_safelock.gate.policy import EvaluationRule
from mlflow_safelock.provenance import (
    EvaluationStatement,
    Measured,
    MeasuredForm,
    MeasuredRate,
    Signatory,
    signed_evaluation,
)

USUAL_NEW_TOKENS = 128
"""Most tokens of an answer where ``safelock evaluate`` is told no number."""

DTYPES = ("float32", "bfloat16", "float16")
"""The number formats that ``safelock evaluate`` can be told to load a model in."""


def check_applies(approved: Approved, lock: str, alpha: float, form: MeasuredForm) -> None:
    """Refuse to have something measured, or filed, that would never count.

    Args:
        approved: What a promotion would apply.
        lock: Digest of the lock that is measured.
        alpha: Its strength.
        form: What is asked, and in which form.

    Raises:
        PromotionRefused: It would apply another lock, or another strength, or the policy asks for another
            suite or form, or another version of this package, or the lock knows too much of the suite.
    """
    wanted, rule, suite = approved.lock, approved.rule.evaluation, form.suite.name
    if (lock, alpha) != (wanted.lock.digest, approved.alpha):
        raise PromotionRefused(
            "other_lock",
            f"It is of {lock} at alpha {alpha:g}, and a promotion would apply {wanted.title}, "
            f"{wanted.lock.digest}, at alpha {approved.alpha:g}.",
            next_step=f"Measure that: {_command(approved, rule, suite)}",
        )
    if rule is not None:
        asked = {rule.digest_of(one): one for one in rule.suites}
        differs = list(_differences(form, rule, asked.keys()))
        if differs:
            raise PromotionRefused(
                "other_evaluation",
                f"It would not count: {'; '.join(differs)}.",
                next_step=f"Measure what the policy asks for{_with_what(rule)}: "
                f"{_command(approved, rule, asked.get(form.suite.digest, rule.suites[0]))}",
            )
        _check_known_prompts(form, approved, rule, asked[form.suite.digest])


def check_signature(
    rule: EvaluationRule | None, statement: EvaluationStatement, envelope: bytes | None
) -> None:
    """Refuse a statement that would not count for want of a signature; where none is needed, any will do.

    Args:
        rule: What the policy asks of evaluations.
        statement: The statement.
        envelope: Its signature file.

    Raises:
        PromotionRefused: The policy wants it signed by somebody whom it names, and it is not.
        SigstoreError: The policy names identities, and no signature of one can be verified here.
    """
    if rule is None or not rule.signature.required:
        return
    if envelope is None:
        raise PromotionRefused(
            "unsigned_evaluation",
            "The policy wants evaluations signed, and this one is not.",
            next_step=f"Measure it {_signed_by(rule)}.",
        )
    if signed_by_rule(rule, envelope) != statement:
        raise PromotionRefused(
            "bad_signature",
            "The signature is one of another evaluation.",
            next_step="Measure again, or sign this one.",
        )


def signed_by_rule(rule: EvaluationRule | None, envelope: bytes) -> EvaluationStatement:
    """The statement that a client without the ledger wants filed: nothing in it is believed unsigned.

    Args:
        rule: What the policy asks of evaluations.
        envelope: The signature file.

    Raises:
        PromotionRefused: The policy asks for no signatures, or nobody signed this whom it names.
        SigstoreError: The policy names identities, and no signature of one can be verified here.
    """
    signatories = signatories_of(rule)
    try:
        return signed_evaluation(envelope, signatories, origin="The signature of the evaluation")
    except VerificationError as error:
        raise PromotionRefused(
            "bad_signature",
            error.cause,
            next_step="Measure with a key of the policy's (evaluation.signature) in SAFELOCK_SIGNING_KEY, or "
            "as one of its identities (SAFELOCK_SIGSTORE_SIGNING).",
        ) from error


def signatories_of(rule: EvaluationRule | None) -> tuple[Signatory, ...]:
    """Those whose evaluations count from whoever files them.

    Raises:
        PromotionRefused: The policy does not ask for signatures, so only the ledger's writers are believed.
    """
    if rule is None or not rule.signature.required:
        raise PromotionRefused(
            "signatures_not_asked_for",
            "Through a server evaluations are taken only where the policy says whose signature they need, "
            "since anybody may send one.",
            next_step="Set evaluation.signature in the policy (docs/gate.md), or file it on the registry's "
            "database: --registry-uri safelock+...",
        )
    return rule.signature.signatories


def check_limits(measured: Measured, approved: Approved, rule: EvaluationRule, suite: str) -> None:
    """Refuse an evaluation of the promotion that is too old, or found more than the policy allows.

    Args:
        measured: What was found.
        approved: What a promotion would apply.
        rule: What the policy asks of evaluations.
        suite: The suite, as the policy names it.

    Raises:
        PromotionRefused: It is.
    """
    _check_age(measured, approved, rule, suite)
    _check_known_prompts(measured.form, approved, rule, suite)
    for what, found, allowed in _rates(measured, rule):
        if found is None or found.compared > allowed:
            shown = "was not measured" if found is None else f"is {found}"
            raise PromotionRefused(
                "evaluation_failed",
                f"The {what} of {approved.request.name!r} version {approved.request.version} on {suite} "
                f"{shown}, and the policy allows {allowed:.1%}: measured at {measured.created}.",
                next_step=_what_helps(found, allowed),
            )


def is_bound(measured: Measured, approved: Approved, rule: EvaluationRule, suite: str) -> bool:
    """Whether an evaluation is of a promotion's lock and strength and of a suite (by digest), as wanted."""
    found = (measured.lock, measured.alpha)
    return found == (approved.lock.lock.digest, approved.alpha) and not any(
        _differences(measured.form, rule, (suite,))
    )


def _differences(form: MeasuredForm, rule: EvaluationRule, suites: Collection[str]) -> Iterator[str]:
    """In what something was, or would be, measured otherwise than a policy asks for; ``suites`` by digest."""
    if form.suite.digest not in suites:
        yield f"it asks {form.suite.name} with the digest {form.suite.digest}, or a part of a suite"
    if not rule.counts_judge(form.judge):
        yield f"its judge is {form.judge!r}, and the policy's {rule.judge!r}"
    for what, is_so, wanted in (
        ("wrapper", form.transform, rule.transform),
        ("system prompt", form.system_prompt, rule.system_prompt),
    ):
        if is_so != wanted:
            yield f"its {what} is {is_so!r}, and the policy's {wanted!r}"
    if form.max_new_tokens < rule.min_new_tokens:
        yield f"its answers may have {form.max_new_tokens} tokens, and the policy wants {rule.min_new_tokens}"
    if rule.dtypes is not None and form.dtype not in rule.dtypes:
        found = form.dtype or "an unknown number format"
        yield f"its model is in {found}, and the policy wants {_or(rule.dtypes)}"
    if not rule.counts(form.version):
        yield (
            f"it is by version {form.version or 'unknown'} of mlflow-safelock, and the policy wants "
            f"{rule.safelock_version}"
        )
    if rule.max_known_prompts is not None and form.known_prompts is None:
        yield "whether its lock was forged from its prompts is not known, and the policy wants to know"


def why_not(statements: Iterable[EvaluationStatement], rule: EvaluationRule, suite: str) -> str:
    """Why the newest evaluation of a suite (by its digest) does not count, to follow a sentence; or nothing.

    Args:
        statements: What is on record under a promotion's lock and strength.
        rule: What the policy asks of evaluations.
        suite: The suite's digest.
    """
    measured = (one.predicate for one in statements if one.predicate.suite.digest == suite)
    newest = max(measured, key=lambda one: one.time, default=None)
    why = "" if newest is None else "; ".join(_differences(newest.form, rule, (suite,)))
    return f". What was measured at {newest.created} does not count: {why}" if newest and why else ""


def _check_known_prompts(form: MeasuredForm, approved: Approved, rule: EvaluationRule, suite: str) -> None:
    """Refuse what was, or would be, measured by too many prompts that the lock was forged from."""
    known, allowed = form.known_prompts or 0, rule.max_known_prompts
    if allowed is not None and known > allowed:
        raise PromotionRefused(
            "known_prompts",
            f"The lock {approved.lock.title} was forged from {known} prompts of {suite}, or their twins, "
            f"and the policy allows {allowed}: what it does to those says little of others.",
            next_step="Forge the base's lock from pairs without these prompts, or have the policy ask for "
            "another suite.",
        )


def _check_age(measured: Measured, approved: Approved, rule: EvaluationRule, suite: str) -> None:
    age = datetime.now(UTC) - measured.time
    allowed = timedelta.max if rule.max_age_days is None else timedelta(days=rule.max_age_days)
    # A clock may be a little fast; a date in the future would never become old.
    if not timedelta(minutes=-10) <= age <= allowed:
        raise refusal(
            "evaluation_too_old",
            f"The evaluation of {approved.request.name!r} version {approved.request.version} on {suite} says "
            f"that it was made at {measured.created}, and the policy allows "
            f"{'any time before now' if rule.max_age_days is None else f'{rule.max_age_days} days'}.",
            approved,
            rule,
            suite,
        )


@dataclass(frozen=True)
class _Found:
    """What was found, and what of it must keep a limit.

    Attributes:
        value: The rate, or the drop of utility.
        upper: The upper end of its interval of 95 %, where that must keep the limit.
    """

    value: float
    upper: float | None = None

    @property
    def compared(self) -> float:
        return self.value if self.upper is None else max(self.value, self.upper)

    def __str__(self) -> str:
        upper = "" if self.upper is None else f" (its interval of 95 % ends at {self.upper:.1%})"
        return f"{self.value:.1%}{upper}"

    @classmethod
    def of(cls, rate: MeasuredRate | None, rule: EvaluationRule) -> _Found | None:
        if rate is None or rule.bound == "rate":
            return None if rate is None else cls(rate.value)
        # Here, for it takes a second to import, and a registry's server may never need it.
        from mlflow_safelock.evaluate.statistics import rate_interval

        return cls(rate.value, rate_interval(min(rate.count, rate.total), rate.total).high)


def _rates(measured: Measured, rule: EvaluationRule) -> Iterator[tuple[str, _Found | None, float]]:
    yield "harmful rate", _Found.of(measured.harmful, rule), rule.max_harmful_rate
    if rule.max_utility_drop is not None:
        utility = measured.utility
        yield "drop of utility", None if utility is None else _Found(utility.drop), rule.max_utility_drop
    for what, name, allowed in (
        ("over-refusal rate", "over_refusal_rate", rule.max_over_refusal_rate),
        ("degenerate rate", "degenerate_rate", rule.max_degenerate_rate),
    ):
        if allowed is not None:
            yield what, _Found.of(measured.rates.get(name), rule), allowed


def _what_helps(found: _Found | None, allowed: float) -> str:
    if found is not None and found.value <= allowed:
        return (
            "The interval is as wide as the prompts are few: have the policy ask for a larger suite, or find "
            "another lock or strength: docs/evaluation.md."
        )
    return "Find another lock or strength for it, or change it: docs/evaluation.md."


def refusal(
    reason: str, cause: str, approved: Approved, rule: EvaluationRule, suite: str
) -> PromotionRefused:
    """A refusal with the command that would make the evaluation that is missing."""
    return PromotionRefused(
        reason,
        cause,
        next_step=_where(rule) + _command(approved, rule, suite),
    )


def _where(rule: EvaluationRule) -> str:
    tool = _with_what(rule)
    if not rule.signature.required:
        return f"Measure it{tool}, where the registry's database can be reached, and promote again: "
    return f"Measure it{tool} {_signed_by(rule)}, and promote again: "


def _with_what(rule: EvaluationRule) -> str:
    return f" by mlflow-safelock{rule.safelock_version}" if rule.safelock_version is not None else ""


def _or(names: Sequence[str]) -> str:
    return " or ".join(names)


def _signed_by(rule: EvaluationRule) -> str:
    """How to have an evaluation signed so that it counts."""
    keys = _or([key.title for key in rule.signature.keys])
    identities = _or([identity.title for identity in rule.signature.identities])
    ways = (
        f"with the key {keys} in SAFELOCK_SIGNING_KEY" if keys else "",
        f"as {identities} (SAFELOCK_SIGSTORE_SIGNING)" if identities else "",
    )
    return ", or ".join(way for way in ways if way)


def typed_judge(judge: str) -> str:
    """How a judge is named to the command: by its URI or hub id, and a folder, of unknown path, by PATH."""
    if re.match(r"[\w+-]+:/", judge):
        return re.sub("@[0-9a-f]{16}$", "", judge)
    return re.sub(r"[^:]+@[0-9a-f]{16}(?![0-9a-f])", "PATH", judge, count=1)


def _command(approved: Approved, rule: EvaluationRule | None, suite: str) -> str:
    """What to type; options that have the value wanted by default are left out."""
    lock = f"models:/{approved.lock.model}/{approved.lock.version}"
    words = ["safelock", "evaluate", approved.uri, "--lock", lock, "--alpha", f"{approved.alpha!r}"]
    # A suite that is not shipped is named by its digest, which leads to no file.
    words += ["--suite", suite if suite in SHIPPED else "SUITE"]
    if rule is not None:
        wanted = {
            "--judge": typed_judge(rule.judge),
            "--transform": rule.transform,
            "--system-prompt": rule.system_prompt,
        }
        usual = {"--judge": "refusal-match", "--transform": "plain", "--system-prompt": None}
        for option, value in wanted.items():
            if value is not None and value != usual[option]:
                words += [option, value]
        if rule.min_new_tokens > USUAL_NEW_TOKENS:
            words += ["--max-new-tokens", str(rule.min_new_tokens)]
        if rule.dtypes is not None and rule.dtypes[0] in DTYPES:
            words += ["--dtype", rule.dtypes[0]]
        if rule.max_known_prompts is not None and pairs_of(approved.lock.lock) is None:
            words += ["--forged-from", "PAIRS"]
    return shlex.join([*words, "--file"])
