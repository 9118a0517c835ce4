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
from importlib.machinery import all_suffixes
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from threading import Lock
from types import ModuleType
from typing import Any

from mlflow.models import Model

from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.provenance import LocalArtifacts, contents_of

BYTECODE = "__pycache__"

LINKED_FROM_BYTES = 1 << 20
"""Size of files that a copy shares with the folder, where the file system can."""

_own_code: list[tuple[TemporaryDirectory[str], Path]] = []
"""The copies with code, which Python may import from until this process ends, and where in them it is."""

_adding = Lock()


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
        EvaluationError: This process has other code under the name of one of the model's modules.
    """
    import mlflow

    copy = TemporaryDirectory(prefix="safelock-judge-")
    code = _code_of(folder)
    _copy(folder, Path(copy.name), code)
    digest = digest_of(Path(copy.name))
    if code is not None:
        with _adding:
            _refuse_others(Path(copy.name) / code)
            _own_code.append((copy, Path(copy.name) / code))
    model = mlflow.pyfunc.load_model(copy.name)
    # Weights, and code, may be read when they are used first.
    model.safelock_folder = copy
    return model, digest


def _code_of(folder: Path) -> str | None:
    """Where a model's own code is in its folder."""
    code = Model.load(str(folder)).flavors.get("python_function", {}).get("code")
    return str(code) if code and (folder / str(code)).is_dir() else None


def _copy(folder: Path, copy: Path, code: str | None) -> None:
    for file in LocalArtifacts(folder).files():
        path = PurePosixPath(file.path)
        if BYTECODE in path.parts:
            continue
        source, target = folder / path, copy / path
        target.parent.mkdir(parents=True, exist_ok=True)
        is_code = code is not None and path.is_relative_to(code)
        if is_code or file.size < LINKED_FROM_BYTES or not _linked(source, target):
            shutil.copyfile(source, target)


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)
    except OSError:
        return False
    return True


def _refuse_others(code: Path) -> None:
    """Refuse code while there is, or may be, other code in this process under the name of a module of it."""
    for name, own in _modules_in(code).items():
        module = sys.modules.get(name)
        is_free = module is None or any(_is_the_same(own, place) for place in _places_of(module))
        earlier = (_modules_in(folder).get(name, own) for _, folder in _own_code)
        if not is_free or not all(_is_the_same(own, other) for other in earlier):
            raise EvaluationError(
                f"It has a module {name!r}, and this process has loaded another one of that name, by which "
                "it would judge.",
                next_step="Measure in a process of its own, such as that of safelock evaluate.",
            )


def _modules_in(code: Path) -> dict[str, Path]:
    """What Python may import from a folder by its name: files of code, and folders that hold some."""
    found = {}
    for path in code.iterdir():
        name = path.name.partition(".")[0]
        is_code = any(path.rglob("*.py")) if path.is_dir() else path.name.endswith(tuple(all_suffixes()))
        if is_code and name != "__main__" and name not in sys.builtin_module_names:
            found[name] = path
    return found


def _places_of(module: ModuleType) -> Iterator[Path]:
    """The folders of a package, or the file of a module."""
    file = getattr(module, "__file__", None)
    yield from map(Path, getattr(module, "__path__", [file] if file else []))


def _is_the_same(own: Path, other: Path) -> bool:
    """Whether two files, or folders, hold the same."""
    return own == other or _contents_of(own) == _contents_of(other)


def _contents_of(place: Path) -> dict[str, bytes]:
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): path.read_bytes() for path in files if BYTECODE not in path.parts}
