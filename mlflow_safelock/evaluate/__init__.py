"""What a model answers, and how often: refusals, compliance, degeneration, and the sweep over K and alpha."""

from mlflow_safelock.evaluate.answers import AnswerKind, classify
from mlflow_safelock.evaluate.measurement import BenignTask, Measurement, measure
from mlflow_safelock.evaluate.sweep import Constraints, Point, Sweep, sweep

__all__ = [
    "AnswerKind",
    "BenignTask",
    "Constraints",
    "Measurement",
    "Point",
    "Sweep",
    "classify",
    "measure",
    "sweep",
]
