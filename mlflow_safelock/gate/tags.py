"""The tags that the gate gives a version, for people who look at it in the UI; never evidence."""

from __future__ import annotations

from dataclasses import dataclass

STATE_TAG = "safelock.state"
"""``locked`` after a promotion, ``unlocked`` once the lock was taken off."""

RECEIPT_TAG = "safelock.receipt"
"""Digest of the locked model's receipt."""

UNLOCKED = "unlocked"
"""What the tag for the state says then."""


@dataclass(frozen=True)
class Stated:
    """What the tags of a locked version say.

    Attributes:
        lock_model: Registered model that the lock was taken from.
        lock_version: Its version there.
        lock_digest: Its content digest.
        alpha: Its strength.
        base_model: The base model it was made for.
        kinship: Cosine between the weights of fine-tune and base, -1 to 1; ``None`` where it is not known.
        receipt: Digest of the locked model's receipt.
    """

    lock_model: str
    lock_version: int
    lock_digest: str
    alpha: float
    base_model: str
    kinship: float | None
    receipt: str

    @property
    def tags(self) -> dict[str, str]:
        """The tags, by key."""
        return {
            STATE_TAG: "locked",
            "safelock.lock": f"models:/{self.lock_model}/{self.lock_version}",
            "safelock.lock_digest": self.lock_digest,
            "safelock.applied_alpha": f"{self.alpha:g}",
            "safelock.base": self.base_model,
            "safelock.kinship": "unknown" if self.kinship is None else f"{self.kinship:.4f}",
            RECEIPT_TAG: self.receipt,
        }


LOCK_TAGS = tuple(key for key in Stated("", 1, "", 1.0, "", None, "").tags if key != STATE_TAG)
"""Keys of the tags that are about a lock, and go with it."""
