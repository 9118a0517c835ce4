"""A judge that MLflow loads, in a process of its own.

MLflow puts the code of a model on Python's path, where it stays, and models set globals, change the working
directory, print or exit. In a process of its own a judge judges by its own code, whatever this process or
another judge has loaded, and nothing that it does to its process is done to this one.

The two speak through pipes: requests are lines of JSON, and answers too, each after the number of its request
and a word that only the two know, so that what is printed at start-up is no answer. What a judge prints later
goes to standard error.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import weakref
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING, Any

import mlflow_safelock
from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate.verdicts import UnreadableJudgeError, column_of

if TYPE_CHECKING:
    import pandas

SECONDS_TO_END = 5.0
"""How long a process has to end by itself once nothing more is asked of it."""

# This package, wherever it was imported from, and the path otherwise as it would be.
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); import mlflow_safelock; sys.path.pop(0); "
    f"from {__name__} import serve; serve(*sys.argv[2:])"
)


class JudgeProcess:
    """A model of MLflow in a process of its own; threads may share it.

    Args:
        folder: The model's folder, which nobody else writes to.
        place: The temporary folder that it is in; it is removed when the process ends.

    Raises:
        EvaluationError: The model cannot be loaded.
    """

    def __init__(self, folder: Path, place: Path) -> None:
        if not sys.executable:
            raise EvaluationError(
                "A judge in MLflow judges in a process of its own, and this Python does not say where its "
                "program is (sys.executable).",
                next_step="Measure with another Python, such as by safelock evaluate.",
            )
        self._word = secrets.token_hex(8)
        package = Path(mlflow_safelock.__file__).resolve().parents[1]
        arguments = (package, folder.resolve(), place.resolve(), self._word)
        self._process = subprocess.Popen(
            # Neither the working directory's modules, nor bytecode beside the code.
            [sys.executable, "-P", "-B", "-c", _START, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, self._process, place, os.getpid())
        self._one_at_a_time = Lock()
        self._number = 0
        try:
            self._answer(None)
        except BaseException:
            self._end()
            raise

    def predict(self, table: pandas.DataFrame) -> pandas.Series:
        """What the model says of each row, under the name of its column.

        Raises:
            EvaluationError: The model failed at it.
            UnreadableJudgeError: What it gives cannot be understood, or the process has ended.
        """
        import pandas

        said = self._answer(table.to_dict("list"))
        return pandas.Series(said["values"], name=said["column"], dtype=object)

    def _answer(self, request: dict[str, Any] | None) -> dict[str, Any]:
        """What the process says next, after a request if there is one."""
        with self._one_at_a_time:
            said = self._exchange(request) if self._end.alive else None
        if said is None:
            raise UnreadableJudgeError(
                f"The judge's process has ended, with the exit code {self._process.returncode}.",
                next_step="What it wrote to standard error may say why; one that was killed (-9) may have "
                "needed more memory than there is. Load the judge again.",
            )
        if "unreadable" in said:
            cause, next_step = said["unreadable"]
            raise UnreadableJudgeError(cause, next_step=next_step)
        if "failed" in said:
            raise EvaluationError(said["failed"])
        return said

    def _exchange(self, request: dict[str, Any] | None) -> dict[str, Any] | None:
        """The answer to a request; ``None``, and the process is ended, where none comes."""
        assert self._process.stdin is not None
        try:
            if request is not None:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            said: dict[str, Any] = json.loads(self._next_line())
            self._number += 1
        except (OSError, ValueError):
            self._end()
            return None
        except BaseException:
            # The answer that was not waited for would be taken for that to the next request.
            self._process.kill()
            self._end()
            raise
        return said

    def _next_line(self) -> bytes:
        """The answer that comes next.

        Raises:
            ValueError: There is none, or it is one to another request.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, _, answer = line.partition(b" ")
            if word.decode(errors="replace") == self._word:
                number, _, said = answer.partition(b" ")
                if int(number) != self._number:
                    break
                return said
        raise ValueError


def _end(process: subprocess.Popen[bytes], place: Path, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process whose judge it is
        return
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with suppress(OSError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
    finally:
        # With what it started, and left behind.
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        shutil.rmtree(place, ignore_errors=True)


def serve(folder: str, place: str, word: str) -> None:
    """Load the model of a folder, and answer requests until there are no more; then remove the folder.

    Args:
        folder: The model's folder.
        place: The temporary folder that it is in.
        word: What answers begin with.
    """
    requests, answers = _own_pipes()
    number = 0

    def tell(said: str) -> None:
        nonlocal number
        answers.write(f"{word} {number} {said}\n".encode())
        answers.flush()
        number += 1

    try:
        try:
            import mlflow

            model = mlflow.pyfunc.load_model(folder)
        except BaseException as error:  # noqa: BLE001 - what loading raises depends on the flavor
            tell(_failure(error))
            return
        tell(json.dumps({"ready": True}))
        for line in requests:
            tell(_answer(model, line))
    except BrokenPipeError:
        pass  # whoever asked is gone
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _own_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input and output, out of the model's reach: it reads nothing, and prints to standard error."""
    pipes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")

    def out_of_reach() -> None:
        # What the model forks would answer, too, or keep the pipe open when the model's process is gone.
        nothing = os.open(os.devnull, os.O_RDWR)
        for pipe in pipes:
            os.dup2(nothing, pipe.fileno())
        os.close(nothing)

    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.close(nothing)
    with suppress(OSError):  # it may be closed
        os.dup2(2, 1)
    os.register_at_fork(after_in_child=out_of_reach)
    return pipes


def _answer(model: Any, request: bytes) -> str:
    import pandas

    try:
        name, values = column_of(model.predict(pandas.DataFrame(json.loads(request))))
        return json.dumps({"column": name, "values": values}, default=_plain)
    except UnreadableJudgeError as error:
        return json.dumps({"unreadable": [error.cause, error.next_step]})
    except BaseException as error:  # noqa: BLE001 - whatever it raises, also to exit, is its failure
        return _failure(error)


def _failure(error: BaseException) -> str:
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - it may say nothing of itself
        text = type(error).__name__
    return json.dumps({"failed": text})


def _plain(value: Any) -> Any:
    """What JSON has no form of: numbers of numpy as Python's, anything else as words that are no verdict."""
    plain = value.item() if hasattr(value, "item") else value
    return plain if isinstance(plain, bool | int | float | str) else repr(value)
