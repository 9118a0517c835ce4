"""``python -m benchmarks``: measure, show a table, write a JSON file."""

from __future__ import annotations

import io
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from benchmarks.harness import Settings
from benchmarks.machine import describe, load
from benchmarks.results import Results, Row
from benchmarks.table import machine_line, make_console, table_of

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    *("apply", "promotion", "s3", "standalone", "probes", "forge", "serving", "transition", "concurrency"),
    *("evaluation", "gpu"),
)
"""The benchmarks, in the order in which they run; each is the module of that name."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON file to write. [default: benchmarks/results/<time>.json]",
)
@click.option(
    "--quick", is_flag=True, help="Small sizes, to see that everything runs; the figures mean little."
)
@click.option(
    "--megabytes",
    type=click.IntRange(85, 2740),
    default=340,
    show_default=True,
    help="Weights of the model that is promoted and served, in steps of 85: one Llama-3-8B attention layer.",
)
@click.option(
    "--probe-heads",
    type=click.IntRange(32, 8192),
    default=1024,
    show_default=True,
    help="Number of heads that are probed, rounded to whole layers of 32.",
)
def main(names: tuple[str, ...], output: Path | None, quick: bool, megabytes: int, probe_heads: int) -> None:
    """Measure this project side by side with the other ways to do the same, all or the NAMES given."""
    console, started, load_before = make_console(), datetime.now(UTC), load()
    clock = time.perf_counter()
    rows: list[Row] = []
    with _quiet(), _scratch() as scratch:
        shared = ROOT.parent / "shared" / "data" / "published_locks"
        settings = Settings(scratch, shared if shared.is_dir() else None, quick, megabytes, probe_heads)
        for name in names or NAMES:
            with console.status(f"Measuring {name}"):
                for row in import_module(f"benchmarks.{name}").run(settings):
                    rows.append(row)
                    console.print(f"{row.benchmark}, {row.case}: {row.ratio.median:.3g}")
    results = Results(
        format_version=1,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - clock, 1),
        quick=quick,
        machine=describe(load_before),
        rows=tuple(rows),
    )
    path = output or ROOT / "benchmarks" / "results" / f"{started:%Y-%m-%dT%H%M%SZ}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(results.model_dump_json(indent=2) + "\n")
    console.print(table_of(results.rows))
    console.print(machine_line(results.machine))
    console.print(f"{results.seconds:g} s in all; written to {path}")


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder that also takes what MLflow downloads, so that nothing is left behind."""
    before, variable = tempfile.tempdir, os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="safelock-benchmarks-") as folder:
        try:
            tempfile.tempdir = os.environ["TMPDIR"] = folder
            yield Path(folder)
        finally:
            tempfile.tempdir = before
            os.environ.pop("TMPDIR") if variable is None else os.environ.update(TMPDIR=variable)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the libraries have to say out of the table."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
