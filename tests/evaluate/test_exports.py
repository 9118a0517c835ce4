"""The room's names lead to things, not to the modules that hold them, and suites load nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import mlflow_safelock.evaluate


def test_every_name_leads_to_what_it_names() -> None:
    for name in mlflow_safelock.evaluate.__all__ * 2:
        assert not isinstance(getattr(mlflow_safelock.evaluate, name), ModuleType), name


def test_a_server_can_ask_for_a_suite_without_importing_torch() -> None:
    code = (
        "import sys; from mlflow_safelock.evaluate.suites import load_suite; load_suite('starter-harmful')\n"
        "print(sorted({'torch', 'transformers', 'scipy', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
