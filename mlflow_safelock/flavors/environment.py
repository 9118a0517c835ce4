"""What a model folder says about the environment it loads in; the same for every flavor here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from mlflow.utils.environment import (
    _CONDA_ENV_FILE_NAME,
    _CONSTRAINTS_FILE_NAME,
    _PYTHON_ENV_FILE_NAME,
    _REQUIREMENTS_FILE_NAME,
    _mlflow_conda_env,
    _process_conda_env,
    _process_pip_requirements,
    _PythonEnv,
    _validate_env_arguments,
)

from mlflow_safelock.provenance import installed_version

PACKAGE = "mlflow-safelock"


def pinned(package: str) -> str:
    """The requirement line for the installed version of ``package``."""
    return f"{package}=={installed_version(package)}"


def default_pip_requirements() -> list[str]:
    """What a folder of this package's flavors needs in order to load."""
    return [pinned(PACKAGE)]


def default_conda_env() -> dict[str, Any]:
    """The same as a conda environment."""
    environment: dict[str, Any] = _mlflow_conda_env(additional_pip_deps=default_pip_requirements())
    return environment


def write_environment(
    path: Path,
    *,
    conda_env: dict[str, Any] | str | None = None,
    pip_requirements: Sequence[str] | str | None = None,
    extra_pip_requirements: Sequence[str] | str | None = None,
    default: Sequence[str],
) -> dict[str, str]:
    """Write ``conda.yaml``, ``python_env.yaml`` and ``requirements.txt`` into a model folder.

    The arguments mean what they mean in every MLflow flavor; ``default`` is used where neither ``conda_env``
    nor ``pip_requirements`` is given.

    Returns:
        The flavor entry that names the files, ``{"conda": ..., "virtualenv": ...}``.
    """
    _validate_env_arguments(conda_env, pip_requirements, extra_pip_requirements)
    if conda_env is None:
        conda_env, requirements, constraints = _process_pip_requirements(
            None if pip_requirements is not None else list(default), pip_requirements, extra_pip_requirements
        )
    else:
        conda_env, requirements, constraints = _process_conda_env(conda_env)
    (path / _CONDA_ENV_FILE_NAME).write_text(yaml.safe_dump(conda_env, sort_keys=False))
    (path / _REQUIREMENTS_FILE_NAME).write_text("".join(f"{line}\n" for line in requirements))
    if constraints:
        (path / _CONSTRAINTS_FILE_NAME).write_text("".join(f"{line}\n" for line in constraints))
    _PythonEnv.current().to_yaml(str(path / _PYTHON_ENV_FILE_NAME))
    return {"conda": _CONDA_ENV_FILE_NAME, "virtualenv": _PYTHON_ENV_FILE_NAME}
