"""How strongly a version is locked: as the policy says, or as the version asks within the policy's range."""

from __future__ import annotations

import re

from mlflow_safelock.errors import PromotionRefused
from mlflow_safelock.gate.policy import GateRule
from mlflow_safelock.gate.ports import ModelVersion

ALPHA_TAG = "safelock.alpha"
"""Tag of a model version by which it asks for a strength of its own."""

_DECIMAL = re.compile(r"[0-9]{1,4}(\.[0-9]{1,6})?")


def alpha_for(version: ModelVersion, rule: GateRule) -> float:
    """The strength to lock a version with.

    Raises:
        PromotionRefused: The version asks for one that is no positive decimal number, or is out of range.
    """
    asked = version.tags.get(ALPHA_TAG)
    if asked is None:
        return rule.alpha.default
    allowed = f"from {rule.alpha.min:g} to {rule.alpha.max:g}"
    if not _DECIMAL.fullmatch(asked):
        raise PromotionRefused(
            "bad_alpha",
            f"The tag {ALPHA_TAG!r} of {version.name!r} version {version.version} is {asked[:40]!r}, and "
            "must be a plain decimal number above zero, such as 4.5.",
            next_step=f"Set it to a number {allowed}, or delete it.",
        )
    alpha = float(asked)
    if not rule.alpha.min <= alpha <= rule.alpha.max:
        raise PromotionRefused(
            "alpha_out_of_range",
            f"{version.name!r} version {version.version} asks for alpha {alpha:g}, and the policy allows "
            f"{allowed}.",
            next_step=f"Set the tag {ALPHA_TAG!r} within that range, or delete it.",
        )
    return alpha
