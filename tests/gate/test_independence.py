"""The gate decides without knowing how MLflow stores anything."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mlflow_safelock.gate

FILES = sorted(Path(mlflow_safelock.gate.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_gate_imports_no_mlflow_store(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert not {name for name in imported if name == "mlflow" or name.startswith("mlflow.")}
