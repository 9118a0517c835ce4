"""A judge that MLflow loads, in a process of its own.

MLflow puts the code of a model on Python's path, where it stays, and models set globals, change the working
directory, print or exit. In a process of its own a judge judges by its own code, whatever this process or
another judge has loaded, and nothing that it does to its process is done to this one.

The two speak in lines of JSON through pipes. What a judge prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import IO, TYPE_CHECKING, Any

from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate.verdicts import UnreadableJudgeError, column_of

if TYPE_CHECKING:
    import pandas

SECONDS_TO_END = 5.0
"""How long a process has to end by itself once nothing more is asked of it."""


class JudgeProcess:
    """A model of MLflow in a process of its own; threads may share it.

    Args:
        folder: The model's folder, which nobody else writes to.
        place: The temporary folder that it is in; it is removed once the process has ended.

    Raises:
        EvaluationError: The model cannot be loaded.
    """

    def __init__(self, folder: Path, place: TemporaryDirectory[str]) -> None:
        self._process = subprocess.Popen(
            # Neither the working directory's modules, nor bytecode beside the code.
            [sys.executable, "-P", "-B", "-m", __name__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._end = weakref.finalize(self, _end, self._process, place)
        self._one_at_a_time = Lock()
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
        """The next answer; ``None``, and the process is ended, where none comes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if request is not None:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            said: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            self._end()
            return None
        except BaseException:
            # The answer that was not waited for would be taken for that to the next request.
            self._end()
            raise
        return said


def _end(process: subprocess.Popen[bytes], place: TemporaryDirectory[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with suppress(OSError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        place.cleanup()


def _serve(folder: str) -> None:
    """Load the model of a folder, and answer requests until there are no more."""
    requests, answers = _own_pipes()
    # Whoever started this process is told as well, and ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def tell(line: str) -> None:
        answers.write(line.encode() + b"\n")
        answers.flush()

    try:
        import mlflow

        model = mlflow.pyfunc.load_model(folder)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - what loading raises depends on the flavor
        tell(_failure(error))
        return
    tell(json.dumps({"ready": True}))
    for line in requests:
        tell(_answer(model, line))


def _own_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input and output, out of the model's reach: it reads nothing, and prints to standard error."""
    pipes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return pipes


def _answer(model: Any, request: bytes) -> str:
    import pandas

    try:
        name, values = column_of(model.predict(pandas.DataFrame(json.loads(request))))
        return json.dumps({"column": name, "values": values}, default=_plain)
    except UnreadableJudgeError as error:
        return json.dumps({"unreadable": [error.cause, error.next_step]})
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it raises is its failure
        return _failure(error)


def _failure(error: BaseException) -> str:
    return json.dumps({"failed": f"{type(error).__name__}: {error}"})


def _plain(value: Any) -> Any:
    """What JSON has no form of: numbers of numpy as Python's, anything else as words that are no verdict."""
    return value.item() if hasattr(value, "item") else repr(value)


if __name__ == "__main__":
    _serve(sys.argv[1])
