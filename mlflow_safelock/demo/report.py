"""What the demo found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlflow_safelock.audit import AuditRow
from mlflow_safelock.evaluate import Measurement


@dataclass(frozen=True)
class Example:
    """One prompt and what each model answers."""

    prompt: str
    base: str
    fine_tune: str
    locked: str


@dataclass(frozen=True)
class DemoReport:
    """Figures and evidence of one run.

    Attributes:
        base: The aligned base model.
        fine_tune: The base after a few harmful examples.
        locked: What ``mlflow.pyfunc.load_model("models:/…/Staging")`` gives after the transition.
        alpha: Strength that the sweep chose.
        heads: Number of locked heads that the sweep chose.
        prompts: Number of harmful prompts, and of benign tasks, that each figure stands on.
        fine_tune_steps: Optimiser steps that broke the base.
        points: Points that the sweep measured.
        refusal: What the registry answered without a lock; ``None`` where an earlier run left one.
        examples: A few prompts with everybody's answers.
        rows: The audit of the registry.
        next_steps: Commands to type next.
    """

    base: Measurement
    fine_tune: Measurement
    locked: Measurement
    alpha: float
    heads: int
    prompts: int
    fine_tune_steps: int
    points: int
    refusal: str | None
    examples: tuple[Example, ...]
    rows: tuple[AuditRow, ...]
    next_steps: tuple[str, ...]

    def figures(self) -> dict[str, Any]:
        """The figures as plain values; rates in 0-1."""

        def rates(measurement: Measurement) -> dict[str, float]:
            return {
                "harmful_rate": measurement.harmful_rate,
                "benign_accuracy": measurement.benign_accuracy,
                "degenerate_rate": measurement.degenerate_rate,
            }

        return {
            "base": rates(self.base),
            "fine_tune": rates(self.fine_tune),
            "locked": rates(self.locked),
            "alpha": self.alpha,
            "heads": self.heads,
            "prompts": self.prompts,
        }
