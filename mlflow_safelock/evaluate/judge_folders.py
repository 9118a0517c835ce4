"""Judges that MLflow loads from a folder, with code of their own in it: each judges by its own code.

MLflow puts the code of a model on Python's path, where it stays. Of two judges with a module of the same name
the second would run the first one's, and Python writes bytecode beside the code, by which the folder would be
another one the next time. So a judge is loaded from a copy without bytecode, which lasts as long as the
process, and not where there is other code under the name of one of its modules.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from types import ModuleType
from typing import Any

from mlflow.models import Model

from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.provenance import LocalArtifacts, contents_of

BYTECODE = "__pycache__"

_copies: dict[str, TemporaryDirectory[str]] = {}
"""The copies with code that were loaded from, by their digests: what was imported from one stays imported."""

_copying = Lock()


def digest_of(folder: Path) -> str:
    """What tells a folder from others, 16 hexadecimal digits. Of large files blocks at fixed places count."""
    return contents_of(LocalArtifacts(folder), "0" * 32).digest.removeprefix("sha256:")[:16]


def load_from_copy(folder: Path) -> tuple[Any, str]:
    """Load a model of MLflow by its own code and no other.

    Args:
        folder: Its folder.

    Returns:
        What ``mlflow.pyfunc.load_model`` gives, and the folder's digest, without bytecode.

    Raises:
        EvaluationError: This process has another module under the name of one of the model's.
    """
    import mlflow

    with _copying:
        copy = TemporaryDirectory(prefix="safelock-judge-")
        code = _code_of(folder)
        _copy(folder, Path(copy.name), code)
        digest = digest_of(Path(copy.name))
        if code is not None:
            copy = _copies.setdefault(digest, copy)
            _refuse_others(Path(copy.name) / code)
        model = mlflow.pyfunc.load_model(copy.name)
        # Weights may be read when they are used first.
        model.safelock_folder = copy
        return model, digest


def _code_of(folder: Path) -> str | None:
    """Where a model's own code is in its folder."""
    code = Model.load(str(folder)).flavors.get("python_function", {}).get("code")
    return str(code) if code and (folder / str(code)).is_dir() else None


def _copy(folder: Path, copy: Path, code: str | None) -> None:
    own = None if code is None else folder / code

    def put(source: str, target: str) -> str:
        if own is not None and Path(source).is_relative_to(own):
            return str(shutil.copy2(source, target))
        try:
            os.link(os.path.realpath(source), target)
        except OSError:
            os.symlink(os.path.realpath(source), target)
        return target

    shutil.copytree(
        folder,
        copy,
        copy_function=put,
        ignore=shutil.ignore_patterns(BYTECODE),
        dirs_exist_ok=True,
    )


def _refuse_others(code: Path) -> None:
    """Refuse to load code while there is other code in this process under the name of a module of it."""
    for own in sorted(code.iterdir()):
        name = own.name.partition(".")[0]
        module = sys.modules.get(name)
        if module is not None and not any(_is_the_same(own, place) for place in _places_of(module)):
            raise EvaluationError(
                f"It has a module {name!r}, and this process has loaded another one of that name, by "
                "which it would judge.",
                next_step="Measure in a process of its own, such as that of safelock evaluate.",
            )


def _places_of(module: ModuleType) -> Iterator[Path]:
    """The folders of a package, or the file of a module."""
    folders = getattr(module, "__path__", None)
    yield from map(Path, folders if folders is not None else filter(None, [module.__file__]))


def _is_the_same(own: Path, other: Path) -> bool:
    """Whether two files, or folders, have the same code."""
    return own == other or _contents_of(own) == _contents_of(other)


def _contents_of(place: Path) -> dict[str, bytes]:
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    return {str(path.relative_to(place)): path.read_bytes() for path in files}
