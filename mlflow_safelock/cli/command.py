"""What all commands have in common: errors as two lines, results alone on standard output."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TextIO, TypeVar

import click

from mlflow_safelock.errors import SafelockError

F = TypeVar("F", bound=Callable[..., Any])

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_VERBOSE = "mlflow_safelock.verbose"
_RESULTS = "mlflow_safelock.results"


def _remember(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.meta[_VERBOSE] = True


def verbose_option(function: F) -> F:
    """The option ``--verbose``."""
    return click.option(
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_remember,
        help="Show tracebacks, and what the libraries log.",
    )(function)


class _WithExamples(click.Command):
    """Help that ends with command lines to copy.

    Args:
        examples: Each a line to type; a line that goes on ends in a backslash, and what follows is indented.
    """

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.examples = tuple(examples)

    def format_epilog(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are, since a wrapped command line cannot be copied."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Group(_WithExamples, click.Group):
    """A group of commands, with examples."""


class Command(_WithExamples):
    """A command whose expected failures are two lines and exit code 1, not a traceback.

    While it runs, ``sys.stdout`` is standard error: libraries print where they like, and a result that is
    piped somewhere must hold the result only. ``results()`` is the real one.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        verbose_option(self)

    def invoke(self, context: click.Context) -> Any:
        """Run the command."""
        context.meta[_RESULTS] = sys.stdout
        _set_up_libraries(is_verbose(context))
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return super().invoke(context)
        except Exception as error:
            message = _expected(error)
            if message is None:
                raise
            if is_verbose(context):
                traceback.print_exc()
            for line in message:
                click.echo(line, err=True)
            context.exit(1)


def results() -> TextIO:
    """The stream for the command's result."""
    stream: TextIO = click.get_current_context().meta[_RESULTS]
    return stream


def is_verbose(context: click.Context | None = None) -> bool:
    """Whether ``--verbose`` was given."""
    return _VERBOSE in (context or click.get_current_context()).meta


def _set_up_libraries(verbose: bool) -> None:
    """Have MLflow log warnings only, and nothing draw bars where nobody watches; before any is imported."""
    if not verbose:
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    if not sys.stderr.isatty():
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("TQDM_DISABLE", "1")


def _expected(error: Exception) -> tuple[str, ...] | None:
    """What to print for an error that is no fault of this program; ``None`` for one that is."""
    if isinstance(error, SafelockError):
        lines = (f"Error: {error.cause}", f"Next: {error.next_step}" if error.next_step else "")
        return tuple(line for line in lines if line)
    # MLflow's exception can only have been raised where MLflow was imported already.
    mlflow = sys.modules.get("mlflow.exceptions")
    if mlflow is not None and isinstance(error, mlflow.MlflowException):
        return (f"Error: {error.message}",)
    if isinstance(error, OSError):
        return (f"Error: {error}",)
    return None
