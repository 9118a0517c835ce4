"""What the demo changes in its process while it runs, and puts back."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import torch
from transformers.utils import logging as transformers_logging

QUIET_LOGGERS = ("mlflow", "alembic")
"""Loggers whose information would drown the demo's own."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core.

    The toy is too small to gain much from more, sums come out the same whatever the number of cores, and
    threads that share a busy core would wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables set for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def mlflow_at(tracking_uri: str, registry_uri: str) -> Iterator[None]:
    """MLflow's tracking and registry set for a while."""
    tracking_before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    registry_before = mlflow.get_registry_uri()
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(registry_uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(tracking_before)
        mlflow.set_registry_uri(registry_before if tracking_before != registry_before else None)


@contextmanager
def quiet() -> Iterator[None]:
    """No chatter of MLflow and transformers; errors still come through."""
    levels = {name: logging.getLogger(name).level for name in QUIET_LOGGERS}
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # Stages are deprecated in MLflow, and much used.
            warnings.filterwarnings("ignore", category=FutureWarning, module="mlflow")
            warnings.filterwarnings("ignore", message=".*transition_model_version_stage")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def sqlite_uri(database: Path) -> str:
    """SQLAlchemy's URI of an sqlite file."""
    return f"sqlite:///{database.resolve().as_posix()}"
