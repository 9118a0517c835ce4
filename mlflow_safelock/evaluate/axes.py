"""In what the locks of a search differ, by which tables and pictures tell them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow_safelock.lock import SafetyLock


@dataclass(frozen=True)
class Axis:
    """Something that locks may differ in.

    Attributes:
        of: Its value of a lock; ``None`` where the lock does not say.
        words: How a value reads, after the number of heads.
    """

    of: Callable[[SafetyLock], Any]
    words: str


AXES: Mapping[str, Axis] = {
    "last_tokens": Axis(lambda lock: lock.metadata.last_tokens, "r {}"),
    "split": Axis(lambda lock: lock.metadata.split, "split by {}"),
    "train_fraction": Axis(lambda lock: lock.metadata.train_fraction, "{} for training"),
    "split_seed": Axis(lambda lock: lock.metadata.seed, "split seed {}"),
}
"""The settings of the forge that decide which heads a lock has, and its directions."""

DIGEST = Axis(lambda lock: lock.digest.removeprefix("sha256:")[:12], "lock {}")


@dataclass(frozen=True)
class Axes:
    """The axes on which some locks differ, in their order, beside the number of heads."""

    found: Mapping[str, Axis]

    @classmethod
    def between(cls, locks: Sequence[SafetyLock]) -> Axes:
        """The axes on which locks differ; where those do not tell all of them apart, the digest does."""
        varied = {name: axis for name, axis in AXES.items() if len({axis.of(lock) for lock in locks}) > 1}
        axes = cls(varied)
        if len({axes.label(lock) for lock in locks}) < len(set(locks)):
            axes = cls({**varied, "lock": DIGEST})
        return axes

    def values(self, lock: SafetyLock) -> dict[str, str]:
        """How a lock lies on each axis, for a table."""
        return {name: _shown(axis.of(lock)) for name, axis in self.found.items()}

    def label(self, lock: SafetyLock) -> str:
        """A lock in words, such as ``24 heads (r 3, split seed 1)``."""
        words = ", ".join(axis.words.format(_shown(axis.of(lock))) for axis in self.found.values())
        return f"{len(lock.heads)} heads" + (f" ({words})" if words else "")


def settings_of(lock: SafetyLock) -> dict[str, Any]:
    """What a lock says of each of ``AXES``, for programs."""
    return {name: axis.of(lock) for name, axis in AXES.items()}


def distinct(locks: Iterable[SafetyLock]) -> tuple[tuple[SafetyLock, ...], dict[str, SafetyLock]]:
    """Locks that push differently: of those with the same heads, directions and stds, the first.

    Probes that are fitted on other rows often rank the same heads highest, and then the locks are the same.

    Returns:
        The locks, and, by the digest of each that was left out, the one that it is the same as.
    """
    first: dict[Any, SafetyLock] = {}
    same: dict[str, SafetyLock] = {}
    for lock in locks:
        push = tuple((one.layer, one.head, one.direction.tobytes(), one.std) for one in lock.heads)
        kept = first.setdefault(push, lock)
        if kept is not lock:
            same[lock.digest] = kept
    return tuple(first.values()), same


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "unknown" if value is None else str(value)
