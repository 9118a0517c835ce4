"""What a model answers, and how often: suites, wrappers, refusals, intervals, and the sweep."""

from mlflow_safelock.evaluate.answers import AnswerKind, classify
from mlflow_safelock.evaluate.measurement import BenignTask, Measurement, measure
from mlflow_safelock.evaluate.statistics import (
    Interval,
    PairedTest,
    difference_interval,
    mean_interval,
    paired_test,
    rate_interval,
)
from mlflow_safelock.evaluate.suites import Suite, SuitePrompt, load_suite, overlap
from mlflow_safelock.evaluate.sweep import Constraints, Point, Sweep, sweep
from mlflow_safelock.evaluate.transforms import TRANSFORMS, Message, Transform, find_transform

__all__ = [
    "TRANSFORMS",
    "AnswerKind",
    "BenignTask",
    "Constraints",
    "Interval",
    "Measurement",
    "Message",
    "PairedTest",
    "Point",
    "Suite",
    "SuitePrompt",
    "Sweep",
    "Transform",
    "classify",
    "difference_interval",
    "find_transform",
    "load_suite",
    "mean_interval",
    "measure",
    "overlap",
    "paired_test",
    "rate_interval",
    "sweep",
]
