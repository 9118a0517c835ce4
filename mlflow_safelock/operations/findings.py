"""What a check found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mlflow_safelock.errors import SafelockError

_logger = logging.getLogger(__name__)

Status = Literal["ok", "skipped", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: What was looked at.
        status: ``ok``; ``skipped`` where there is nothing to look at; ``warning`` where it works and may not
            be what is wanted; ``fault`` where it must be fixed.
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


IN_THE_LOG = "The log has the details."


def fault_of(check: str, error: SafelockError) -> Finding:
    """The finding for an error of ours."""
    return Finding(check, "fault", error.cause, error.next_step)


def found(check: str, look: Callable[[], Finding]) -> Finding:
    """What ``look`` finds; an error is a fault, and one that is not ours is told by its kind alone."""
    try:
        return look()
    except SafelockError as error:
        return fault_of(check, error)
    except Exception as error:  # whatever it is, who asks needs an answer
        _logger.error("The check of the %s failed", check, exc_info=error)
        return Finding(check, "fault", f"This check itself failed ({type(error).__name__}).", IN_THE_LOG)


def any_fault(findings: Iterable[Finding]) -> bool:
    """Whether one of them is a fault."""
    return any(finding.status == "fault" for finding in findings)
