"""The public names are these, and importing them is cheap."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import mlflow_safelock

PUBLIC = [
    "SafetyLock",
    "apply_lock",
    "compare",
    "forge",
    "forge_from_activations",
    "import_published_lock",
    "load_lock",
    "save_lock",
    "save_locked_checkpoint",
]


def test_the_public_names_are_exactly_these() -> None:
    assert mlflow_safelock.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(mlflow_safelock))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_leads_to_something_documented(name: str) -> None:
    public = getattr(mlflow_safelock, name)
    assert callable(public), "a function or class, and not a sub-package of the same name"
    assert inspect.getdoc(public)


def test_an_unknown_name_is_the_usual_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'forget'"):
        _ = mlflow_safelock.forget


def test_signatures_are_as_promised() -> None:
    def parameters(name: str) -> list[str]:
        return list(inspect.signature(getattr(mlflow_safelock, name)).parameters)

    assert parameters("forge")[:8] == [
        *("model", "tokenizer", "pairs", "heads", "last_tokens", "system_prompt", "split", "seed"),
    ]
    assert parameters("forge_from_activations")[:6] == [
        *("activations", "labels", "heads", "train_rows", "val_rows", "base_model"),
    ]
    assert parameters("apply_lock") == ["model", "lock", "alpha"]
    assert parameters("compare")[:5] == ["model", "tokenizer", "prompts", "lock", "alpha"]
    assert parameters("import_published_lock")[:3] == ["path", "base_model", "geometry"]
    assert parameters("save_locked_checkpoint")[:4] == ["source_dir", "dest_dir", "lock", "alpha"]


def _modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_and_its_store_builder_loads_nothing_heavy() -> None:
    loaded = _modules_after("import mlflow_safelock, mlflow_safelock.registry")
    assert not loaded & {"torch", "transformers", "mlflow", "sqlalchemy", "matplotlib"}


def test_locking_a_model_in_a_notebook_needs_no_mlflow() -> None:
    loaded = _modules_after("from mlflow_safelock import apply_lock, forge, import_published_lock, load_lock")
    assert not loaded & {"mlflow", "sqlalchemy"}
