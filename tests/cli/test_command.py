"""Errors are two lines and exit code 1; standard output holds the result and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from mlflow.exceptions import MlflowException

from mlflow_safelock.cli.command import Command, results, verbose_option
from mlflow_safelock.errors import LockMismatchError, PromotionRefused


def invoke(work: Callable[[], None], *arguments: str) -> Result:
    """Run a command that does this work, in a group as ``safelock`` is one."""
    group = verbose_option(click.Group("safelock"))
    group.add_command(Command("work", callback=work))
    return CliRunner().invoke(group, arguments or ["work"])


def failing(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    "error",
    [
        LockMismatchError("It does not fit.", next_step="Take another."),
        PromotionRefused("missing_lock", "It does not fit.", next_step="Take another."),
    ],
)
def test_our_errors_say_the_cause_and_the_next_step(error: Exception) -> None:
    done = invoke(failing(error))
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr == "Error: It does not fit.\nNext: Take another.\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (LockMismatchError("It does not fit."), "Error: It does not fit."),
        (MlflowException("No such model."), "Error: No such model."),
        (PermissionError(13, "Permission denied", "/lock"), "Error: [Errno 13] Permission denied: '/lock'"),
    ],
)
def test_an_error_without_a_next_step_is_one_line(error: Exception, line: str) -> None:
    done = invoke(failing(error))
    assert (done.exit_code, done.stderr) == (1, f"{line}\n")


@pytest.mark.parametrize("arguments", [("--verbose", "work"), ("work", "--verbose")])
def test_verbose_shows_the_traceback_too(arguments: tuple[str, ...]) -> None:
    done = invoke(failing(LockMismatchError("It does not fit.")), *arguments)
    assert done.exit_code == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("Error: It does not fit.\n")


def test_a_fault_of_this_program_is_not_dressed_up() -> None:
    done = invoke(failing(ZeroDivisionError("division by zero")))
    assert isinstance(done.exception, ZeroDivisionError)


def test_what_libraries_print_does_not_get_into_the_result() -> None:
    def work() -> None:
        print("View run at http://…")
        results().write("result\n")

    done = invoke(work)
    assert (done.stdout, done.stderr) == ("result\n", "View run at http://…\n")


def test_an_error_of_the_command_line_is_click_s_to_report(tmp_path: Path) -> None:
    done = invoke(failing(click.UsageError("Name one.")))
    assert done.exit_code == 2
    assert "Error: Name one." in done.stderr
