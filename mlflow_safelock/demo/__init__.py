"""The demonstration: a toy model is trained, broken by ten examples, and locked by a stage transition."""

from mlflow_safelock.demo.report import DemoReport, Example
from mlflow_safelock.demo.run import run_demo

__all__ = ["DemoReport", "Example", "run_demo"]
