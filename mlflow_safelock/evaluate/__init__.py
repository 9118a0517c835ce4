"""What a model answers, and how often: suites, refusals, compliance, degeneration, and the sweep."""

from mlflow_safelock.evaluate.answers import AnswerKind, classify
from mlflow_safelock.evaluate.measurement import BenignTask, Measurement, measure
from mlflow_safelock.evaluate.suites import Suite, SuitePrompt, load_suite, overlap
from mlflow_safelock.evaluate.sweep import Constraints, Point, Sweep, sweep

__all__ = [
    "AnswerKind",
    "BenignTask",
    "Constraints",
    "Measurement",
    "Point",
    "Suite",
    "SuitePrompt",
    "Sweep",
    "classify",
    "load_suite",
    "measure",
    "overlap",
    "sweep",
]
