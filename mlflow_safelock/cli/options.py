"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click
from click.core import ParameterSource

from mlflow_safelock.loading import ModelLoading
from mlflow_safelock.unicode import HALF_A_CHARACTER, is_unicode

F = TypeVar("F", bound=Callable[..., Any])

SERVER_ANSWERS_WITHIN = 10
"""Seconds within which an MLflow server must answer at all."""


def unicode_text(value: str) -> str:
    """Text that a model is given: a shell passes on what is not UTF-8 as halves of characters.

    Raises:
        click.BadParameter: It is not valid Unicode; before anything is loaded.
    """
    if not is_unicode(value):
        raise click.BadParameter(f"{value[:60]!r} {HALF_A_CHARACTER}: it is not UTF-8.")
    return value


format_option = click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="A table for people, or JSON for programs.",
)

sharing_option = click.option(
    "--sharing",
    type=click.Choice(["copy", "link"]),
    default="copy",
    show_default=True,
    help="How weights that stay the same get there: as a file of their own, or as a hard link, which costs "
    "nothing and is the artifact store's own file: never to be edited in place. A reflink, which is both, is "
    "used where the filesystem has it.",
)

set_option = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    callback=lambda _context, _parameter, pairs: parse_settings(pairs),
    help="Change one setting of the recipe, by dotted key; may be given several times.",
)


def checked_strength(
    _context: click.Context, _parameter: click.Parameter, value: float | None
) -> float | None:
    """A strength of the command line, refused before anything is loaded where it is none."""
    from mlflow_safelock.apply.alpha import checked_alpha
    from mlflow_safelock.errors import AlphaError

    try:
        return None if value is None else checked_alpha(value)
    except AlphaError as error:
        raise click.BadParameter(str(error)) from error


alpha_option = click.option(
    "--alpha",
    type=float,
    default=None,
    callback=checked_strength,
    help="Strength of the lock.  [default: the lock's own, usually 6]",
)

system_prompt_option = click.option(
    "--system-prompt", type=unicode_text, metavar="TEXT", help="System prompt of every chat."
)

base_model_option = click.option(
    "--base-model", metavar="ID", help="What the base is called.  [default: what it says itself]"
)

base_revision_option = click.option("--base-revision", metavar="COMMIT", help="Its revision.")

cache_option = click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder that keeps activations, so that a run that was cut off goes on where it was.",
)

batch_size_option = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Texts in one forward pass: speed and memory, never the result.",
)


@dataclass(frozen=True)
class MlflowAddress:
    """Where MLflow is.

    Attributes:
        tracking_uri: Tracking server or database; MLflow's own default where not given.
        registry_uri: Model registry; the tracking server's where not given.
    """

    tracking_uri: str | None
    registry_uri: str | None

    def connect(self) -> None:
        """Make it the address that MLflow uses in this process."""
        import mlflow

        if self.tracking_uri is not None:
            mlflow.set_tracking_uri(self.tracking_uri)
        if self.registry_uri is not None:
            mlflow.set_registry_uri(self.registry_uri)

    def reach(self) -> None:
        """Connect, and see that a server there answers: MLflow itself would try again for minutes.

        Raises:
            SourceError: It does not.
        """
        import mlflow

        self.connect()
        for uri in dict.fromkeys((mlflow.get_tracking_uri(), mlflow.get_registry_uri())):
            server = uri.removeprefix("safelock+")
            if server.startswith(("http://", "https://")):
                _refuse_dead_server(server)


def _refuse_dead_server(uri: str) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    from mlflow_safelock.errors import SourceError

    try:
        # Any answer will do: what it means is for the request that matters.
        http_request(
            get_default_host_creds(uri),
            "/health",
            "GET",
            max_retries=0,
            timeout=SERVER_ANSWERS_WITHIN,
            raise_on_status=False,
        )
    except MlflowException as error:
        raise SourceError(
            f"The MLflow server {uri} does not answer: {error.message.splitlines()[0]}",
            next_step="Check the address (--tracking-uri, --registry-uri), and that the server runs.",
        ) from error


def mlflow_options(function: F) -> F:
    """The options that say where MLflow is; the command gets them as ``mlflow_address``."""

    def with_address(
        *arguments: Any, tracking_uri: str | None, registry_uri: str | None, **values: Any
    ) -> Any:
        return function(*arguments, mlflow_address=MlflowAddress(tracking_uri, registry_uri), **values)

    with_address.__doc__ = function.__doc__
    with_address.__name__ = function.__name__
    with_address.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option(
            "--registry-uri",
            envvar="MLFLOW_REGISTRY_URI",
            show_envvar=True,
            help="Model registry, such as http://host:5000 or safelock+sqlite:///registry.db.",
        ),
        click.option(
            "--tracking-uri",
            envvar="MLFLOW_TRACKING_URI",
            show_envvar=True,
            help="Tracking server, such as http://host:5000 or sqlite:///mlflow.db.",
        ),
    ):
        option(with_address)
    return with_address  # type: ignore[return-value]


def model_options(function: F) -> F:
    """The options that say how a model is loaded; the command gets them as ``loading``."""

    def with_loading(
        *arguments: Any,
        dtype: str,
        device: str,
        device_map: str | None,
        offload_folder: Path | None,
        **values: Any,
    ) -> Any:
        if device_map is not None and device != "auto":
            raise click.UsageError("--device names one device, and --device-map takes all: give one of them.")
        if offload_folder is not None and device_map is None:
            raise click.UsageError("--offload-folder is for --device-map: give --device-map auto, too.")
        loading = ModelLoading(dtype, device, device_map, offload_folder)
        return function(*arguments, loading=loading, **values)

    with_loading.__doc__ = function.__doc__
    with_loading.__name__ = function.__name__
    with_loading.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option(
            "--offload-folder",
            type=click.Path(file_okay=False, path_type=Path),
            metavar="DIR",
            help="With --device-map: folder for weights on disk that cannot be read from MODEL's own files.",
        ),
        click.option(
            "--device-map",
            type=click.Choice(["auto", "balanced", "balanced_low_0", "sequential"]),
            help="Spread MODEL over all GPUs, main memory and disk, in one of accelerate's ways, because no "
            "single device holds it.",
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            help="cpu, cuda, cuda:1 …; auto takes a GPU where there is one.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            default="auto",
            show_default=True,
            help="Number format of the weights; auto keeps the checkpoint's.",
        ),
    ):
        option(with_loading)
    return with_loading  # type: ignore[return-value]


data_option = click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Preference pairs: JSON, JSONL or CSV.  [default: the starter pairs of this package]",
)


def pair_keys_options(function: F) -> F:
    """The options that say under which keys a file holds preference pairs; the command gets ``keys``."""

    def with_keys(*arguments: Any, question_key: str, safe_key: str, unsafe_key: str, **values: Any) -> Any:
        return function(*arguments, keys=(question_key, safe_key, unsafe_key), **values)

    with_keys.__doc__ = function.__doc__
    with_keys.__name__ = function.__name__
    with_keys.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    for name, what in (("unsafe", "unsafe answers"), ("safe", "safe answers"), ("question", "questions")):
        click.option(
            f"--{name}-key",
            default=name,
            show_default=True,
            metavar="NAME",
            help=f"Key, or column, of the {what} in a file of preference pairs.",
        )(with_keys)
    return with_keys  # type: ignore[return-value]


def refuse_keys_without(files: Mapping[str, Path | None]) -> None:
    """Refuse keys of a file of preference pairs where none of ``files``, by their options, is given.

    Raises:
        click.UsageError: There are such keys.
    """
    given = given_options("question_key", "safe_key", "unsafe_key")
    if given and not any(files.values()):
        raise click.UsageError(f"{given[0]} is for a file of preference pairs: give {' or '.join(files)}.")


def given_options(*names: str) -> list[str]:
    """Those of the current command's options, by the names of their parameters, that somebody gave."""
    context = click.get_current_context()
    unset = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    return [
        f"--{name.replace('_', '-')}" for name in names if context.get_parameter_source(name) not in unset
    ]


def output_file_option(help_text: str, default: str | None = None) -> Callable[[F], F]:
    """An ``--output`` file, required where there is no default.

    That it can be made there is checked before any work is done.
    """
    return click.option(
        "--output",
        required=default is None,
        default=default,
        show_default=default is not None,
        type=click.Path(dir_okay=False, writable=True, path_type=Path),
        callback=lambda _context, _parameter, path: in_existing_folder(path),
        metavar="PATH",
        help=help_text,
    )


def output_folder_option(default: Path, help_text: str) -> Callable[[F], F]:
    """An ``--output`` folder that may be there already."""
    return click.option(
        "--output",
        type=click.Path(file_okay=False, path_type=Path),
        default=default,
        show_default=True,
        metavar="DIR",
        help=help_text,
    )


def beside(file: Path, rest: str) -> Path:
    """The path beside a file that has its name without the suffix, a hyphen, and ``rest``."""
    return file.with_name(f"{file.stem}-{rest}")


def lines_of(file: TextIO | None, option: str) -> list[str]:
    """The lines of a file of texts that are not blank; none where no file is given.

    Raises:
        click.BadParameter: It is not UTF-8, or all of it is blank.
    """
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{file.name} is not UTF-8 text.", param_hint=option) from error
    if not lines:
        raise click.BadParameter(f"{file.name} holds no text.", param_hint=option)
    return lines


def parse_settings(pairs: tuple[str, ...]) -> dict[str, str]:
    """``key=value`` texts as a mapping.

    Raises:
        click.BadParameter: One has no equals sign or no key, or a key is given twice.
    """
    settings: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE, as in forge.heads=48.")
        if key in settings:
            raise click.BadParameter(f"{key!r} is given twice.")
        settings[key] = value
    return settings


def new_folder(_context: click.Context, _parameter: click.Parameter, path: Path) -> Path:
    """The path of a folder to write, once nothing is known to be there.

    Raises:
        click.BadParameter: Something is.
    """
    if path.exists():
        raise click.BadParameter(f"{path} exists already; name a new folder.")
    return path


new_folder_option = click.option(
    "--output",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    callback=new_folder,
    help="Folder to write; it must not exist.",
)


def in_existing_folder(path: Path) -> Path:
    """The path of a file to write, once its folder is known to be there, and nothing but a file in its place.

    A symlink counts as what it leads to, which is what is written.

    Raises:
        click.BadParameter: There is no such folder, or a directory, a device, a pipe or the like is there.
    """
    from mlflow_safelock.errors import LockError
    from mlflow_safelock.formats.files import regular_target

    try:
        target = regular_target(path)
    except LockError as error:
        raise click.BadParameter(error.cause) from error
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path} cannot be written: {error}.") from error
    if not target.parent.is_dir():
        raise click.BadParameter(f"there is no folder {target.parent}")
    return path
