"""Who may override what the policy has as a rule: take a lock off, revoke one, or ask for another alpha."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_serializer, model_validator

from mlflow_safelock.errors import PromotionRefused
from mlflow_safelock.gate.globs import Glob, matches
from mlflow_safelock.provenance import Actor

_WORDS: dict[str, dict[str, Any]] = {
    "allow": {"by": ("*",), "claimed": "allow"},
    "deny": {"by": (), "claimed": "deny"},
}
"""What the two words of a policy stand for."""


class Permission(BaseModel):
    """Who may do something; in a policy it is ``allow``, ``deny``, or names.

    Attributes:
        by: Globs over user names, case-sensitive.
        claimed: Whether a name counts that MLflow's authentication does not vouch for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    by: tuple[Glob, ...]
    claimed: Literal["allow", "deny"] = "deny"

    @model_validator(mode="before")
    @classmethod
    def _from_a_word(cls, value: object) -> object:
        if isinstance(value, str) and value in _WORDS:
            return _WORDS[value]
        if not isinstance(value, dict):
            raise ValueError("must be allow, deny, or names such as {by: [alice, 'team-*']}")
        if value.get("by") == ():
            raise ValueError("by names nobody, which is written deny")
        return value

    @model_serializer(mode="plain")
    def _as_a_policy_has_it(self) -> str | dict[str, Any]:
        written = {"by": self.by, "claimed": self.claimed}
        return next((word for word, meaning in _WORDS.items() if meaning == written), written)

    def is_for(self, actor: Actor) -> bool:
        """Whether somebody may do it."""
        counts = actor.verified or self.claimed == "allow"
        return counts and any(matches(actor.name, glob) for glob in self.by)

    def __str__(self) -> str:
        if not self.by:
            return "nobody"
        if self == ANYBODY:
            return "anybody"
        names = ", ".join(self.by)
        return f"{names}, authenticated or not" if self.claimed == "allow" else f"{names}, authenticated"


ANYBODY = Permission.model_validate("allow")


def require(permission: Permission, actor: Actor, reason: str, what: str, key: str) -> None:
    """Refuse somebody who may not do something.

    Args:
        permission: Who may.
        actor: Who asks.
        reason: Reason code of the refusal.
        what: What it is, as in "The policy lets nobody ...".
        key: The policy's key that says who may.

    Raises:
        PromotionRefused: They may not.
    """
    if permission.is_for(actor):
        return
    if not permission.by:
        raise PromotionRefused(
            reason, f"The policy lets nobody {what}.", next_step=f"Set '{key}: allow' in the policy."
        )
    name_fits = permission.is_for(Actor(name=actor.name, verified=True))
    why = "is only claimed: MLflow's authentication does not vouch for it" if name_fits else "is none of them"
    raise PromotionRefused(
        reason,
        f"The policy lets {permission} users {what}, and {actor.name!r} {why}.",
        next_step=f"Have one of them do it, or change {key!r} in the policy.",
    )
