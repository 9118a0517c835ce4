"""What a check found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mlflow_safelock.errors import SafelockError

Status = Literal["ok", "skipped", "fault"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: What was looked at.
        status: ``ok``, ``fault``, or ``skipped`` where there is nothing to look at.
        message: What was found, as a sentence.
        next_step: What to do about a fault.
        facts: Values for programs, plain ones.
    """

    check: str
    status: Status
    message: str
    next_step: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def fault_of(check: str, error: SafelockError) -> Finding:
    """The finding for an error of ours."""
    return Finding(check, "fault", error.cause, error.next_step)


def found(check: str, look: Callable[[], Finding]) -> Finding:
    """What ``look`` finds; an error of ours is a fault."""
    try:
        return look()
    except SafelockError as error:
        return fault_of(check, error)


def any_fault(findings: Iterable[Finding]) -> bool:
    """Whether one of them is a fault."""
    return any(finding.status == "fault" for finding in findings)
