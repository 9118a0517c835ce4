"""What a process does to a registry that is going to be killed in the midst of it.

Processes are forked from one that has only imported this module, so that each starts in milliseconds and none
has a connection or a thread of another.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import mlflow
import mlflow.transformers
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import mlflow_safelock.registry.stores  # noqa: F401 - imported once, before the forks
from mlflow_safelock.errors import PromotionRefused
from mlflow_safelock.gate.failpoints import VARIABLE
from mlflow_safelock.registry.actor import process_actor

ROOT = Path(__file__).resolve().parents[2]

REFUSED = 3
"""What a process exits with that was refused."""


@dataclass(frozen=True)
class Place:
    """A registry, and the artifacts beside it."""

    tracking: str
    registry: str
    policy: Path
    folder: Path

    def client(self) -> MlflowClient:
        """A client whose store is in this process, as a server's is."""
        os.environ["SAFELOCK_POLICY"] = str(self.policy)
        mlflow.set_tracking_uri(self.tracking)
        mlflow.set_registry_uri(self.registry)
        return MlflowClient(self.tracking, self.registry)


def run(place: Place, action: str, *arguments: Any, failpoint: str | None = None) -> int:
    """Have another process do something; its exit code, which is negative for a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.registry.dying"])
    process = context.Process(target=_act, args=(place, failpoint, action, arguments))
    # The process that forks finds this module by the environment alone.
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):
        process.start()
    process.join(timeout=120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def _act(place: Place, failpoint: str | None, action: str, arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    client = place.client()
    store = client._get_registry_client().store
    if failpoint is not None:
        os.environ[VARIABLE] = failpoint
    # What is no client's, or what a client asks something before, is done as the server does it.
    owner = store if action in ("prepare", "unlock", "rename_registered_model") else client
    try:
        if action == "demote":
            _demote(store, *arguments)
        else:
            getattr(owner, action)(*arguments)
    except (MlflowException, PromotionRefused) as refusal:
        print(refusal, file=sys.stderr)
        os._exit(REFUSED)
    os._exit(0)


def _demote(store: Any, name: str, version: str) -> None:
    found = store.reconciling.examine(name, int(version), "default", process_actor())
    store.reconciling.repair(found, ("demote",))
