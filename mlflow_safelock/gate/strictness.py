"""A gate by tag is never looser than the gate that decides where the tag is missing.

Anybody may set a tag or take one away. So what a tag leads to must hold nobody back less than no tag does,
and there must be a gate that needs none: a version whose tag is gone falls to that one, and never out of
every gate.
"""

from __future__ import annotations

from collections.abc import Iterator

from mlflow_safelock.gate.globs import covers
from mlflow_safelock.gate.policy import ACCEPTED_TOKENIZERS, EvaluationRule, GateRule, Policy, SignatureRule


def faults_of_tags(policy: Policy) -> Iterator[tuple[int, str]]:
    """Position of each gate by tag that is not allowed, and what is wrong with it."""
    for position, gate in enumerate(policy.gates):
        if not gate.tags:
            continue
        later = [other for other in policy.gates[position + 1 :] if not other.tags]
        floor = next((other for other in later if covers(other.models, gate.models)), None)
        if floor is None:
            yield (
                position,
                f"it is for versions with certain tags, which anybody may take away: it needs a gate without "
                f"tags after it whose models cover {gate.models!r}, such as one for '*'",
            )
            continue
        # A model may fall to any gate in between whose glob it matches as well.
        for other in later[: later.index(floor) + 1]:
            looser = tuple(looser_points(gate, other))
            if looser:
                yield (
                    position,
                    f"its tags may be set by anybody, so it must be no looser than the gate for "
                    f"{other.models!r}, which decides without them; looser here: {', '.join(looser)}",
                )
                break


def looser_points(gate: GateRule, floor: GateRule) -> Iterator[str]:
    """The keys in which ``gate`` holds a promotion back less than ``floor`` does."""
    points = {
        "stages": not set(floor.stages) <= set(gate.stages),
        "aliases": not set(floor.aliases) <= set(gate.aliases),
        "lock.min_version": gate.lock.min_version < floor.lock.min_version,
        "lock.max_age_days": _above(gate.lock.max_age_days, floor.lock.max_age_days),
        "lock.revoked": (gate.lock.revoked, floor.lock.revoked) == ("warn", "refuse"),
        "alpha.min": gate.alpha.min < floor.alpha.min,
        "kinship.min_cosine": gate.kinship.min_cosine < floor.kinship.min_cosine,
        "kinship.unknown": (gate.kinship.unknown, floor.kinship.unknown) == ("allow", "reject"),
        "tokenizer": not set(ACCEPTED_TOKENIZERS[gate.tokenizer])
        <= set(ACCEPTED_TOKENIZERS[floor.tokenizer]),
        "own_biases": (gate.own_biases, floor.own_biases) == ("ignore", "check"),
        **_looser_signature("signature", gate.signature, floor.signature),
        "fingerprint": (gate.fingerprint, floor.fingerprint) == ("sampled", "full"),
        **_looser_evaluation(gate.evaluation, floor.evaluation),
        "missing_lock": (gate.missing_lock, floor.missing_lock) == ("allow", "reject"),
        "no_weights": (gate.no_weights, floor.no_weights) == ("snapshot", "reject"),
        "not_an_llm": (gate.not_an_llm, floor.not_an_llm) == ("allow", "reject"),
        "reads": (gate.reads, floor.reads) == ("warn", "refuse"),
    }
    yield from (key for key, looser in points.items() if looser)


def _looser_evaluation(gate: EvaluationRule | None, floor: EvaluationRule | None) -> dict[str, bool]:
    if floor is None or gate is None:
        return {"evaluation": floor is not None}
    limits = (
        *("max_harmful_rate", "max_utility_drop", "max_over_refusal_rate"),
        *("max_degenerate_rate", "max_known_prompts", "max_age_days"),
    )
    return {
        "evaluation.suites": not set(floor.suites) <= set(gate.suites),
        "evaluation.judge": not floor.counts_judge(gate.judge),
        "evaluation.transform": gate.transform != floor.transform,
        "evaluation.system_prompt": gate.system_prompt != floor.system_prompt,
        "evaluation.min_new_tokens": gate.min_new_tokens < floor.min_new_tokens,
        "evaluation.bound": (gate.bound, floor.bound) == ("rate", "upper"),
        "evaluation.dtypes": floor.dtypes is not None
        and (gate.dtypes is None or not set(gate.dtypes) <= set(floor.dtypes)),
        # Which of two specifiers lets more through cannot be told of all.
        "evaluation.safelock_version": floor.safelock_version not in (None, gate.safelock_version),
        **_looser_signature("evaluation.signature", gate.signature, floor.signature),
        **{f"evaluation.{name}": _above(getattr(gate, name), getattr(floor, name)) for name in limits},
    }


def _looser_signature(key: str, gate: SignatureRule, floor: SignatureRule) -> dict[str, bool]:
    others = {
        name: not set(getattr(gate, name)) <= set(getattr(floor, name))
        for name in ("public_keys", "identities")
    }
    return {
        f"{key}.required": floor.required and not gate.required,
        **{f"{key}.{name}": floor.required and other for name, other in others.items()},
    }


def _above(limit: float | None, floor: float | None) -> bool:
    return floor is not None and (limit is None or limit > floor)
