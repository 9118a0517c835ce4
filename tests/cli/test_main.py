"""Help that a newcomer can work from, and that comes at once."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click
import pytest

from mlflow_safelock.cli import main
from tests.cli.conftest import Run
from tests.servers import BIN


def commands(
    group: click.Group = main, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands())
PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
EACH = pytest.mark.parametrize("path", ALL, ids=" ".join)


def test_the_commands_are_these() -> None:
    assert {" ".join(path) for path in ALL} == {
        *(
            "demo",
            "forge",
            "compare",
            "evaluate",
            "sweep",
            "prepare",
            "promote",
            "export",
            "audit",
            "recipes",
            "reproduce",
        ),
        *("recipes", "run", "doctor", "reconcile"),
        *(
            "lock",
            "lock enroll",
            "lock import",
            "lock inspect",
            "lock register",
            "lock revoke",
            "lock sign",
            "lock verify",
        ),
        *(
            "policy",
            "policy check",
            "ledger",
            "ledger anchor",
            "ledger show",
            "ledger verify",
            "unlock",
            "undo",
        ),
    }


@EACH
def test_every_command_says_what_it_does_and_gives_an_example(run: Run, path: tuple[str, ...]) -> None:
    done = run(*path, "--help")
    assert done.exit_code == 0
    help_text, _, examples = done.stdout.partition("Examples:")
    assert f"safelock {' '.join(path)}" in examples
    assert (ALL[path].help or "").split("\n")[0] in " ".join(help_text.split())
    assert not ALL[path].get_short_help_str(60).endswith("..."), "the list of commands shows it whole"


@EACH
def test_every_option_and_argument_explains_itself(path: tuple[str, ...]) -> None:
    command = ALL[path]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
        else:
            assert (parameter.metavar or parameter.name.upper()) in f"{command.help} {command.short_help}"


def safelock_lines(text: str) -> list[list[str]]:
    """The command lines of ours in a text, without ``safelock`` and what they are piped to."""
    joined = text.replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("$ ").split(" | ")[0] for line in joined]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("safelock ")]


@pytest.mark.parametrize("path", [(), *ALL], ids=lambda path: " ".join(path) or "safelock")
def test_every_example_is_a_command_line_that_exists(path: tuple[str, ...]) -> None:
    lines = safelock_lines("\n".join(ALL.get(path, main).examples))
    assert lines
    for words in lines:
        check_line(words)


def test_every_line_of_the_page_is_a_command_line_that_exists() -> None:
    lines = safelock_lines(PAGE.read_text(encoding="utf-8"))
    shown = [check_line(words) for words in lines]
    assert {command.name for command in ALL.values() if not isinstance(command, click.Group)} <= set(shown)


def check_line(words: list[str]) -> str | None:
    """Find the command of a command line, and its options; the command's name."""
    command: click.Command = main
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
    return command.name


def test_help_imports_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys\nfrom mlflow_safelock.cli import main\nmain(['--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'mlflow', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_installed_script_says_its_version() -> None:
    done = subprocess.run([BIN / "safelock", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(version("mlflow-safelock"))
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["audit", "--nonsense"],
        ["audit", "--format", "xml"],
        ["lock", "inspect"],
        ["run", "demo", "--set", "x"],
    ],
)
def test_a_wrong_command_line_exits_with_2(run: Run, arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: ")
