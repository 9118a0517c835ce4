"""The options of ``evaluate`` and ``sweep``: what a model is asked, under which lock, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlflow_safelock.cli.options import (
    MlflowAddress,
    batch_size_option,
    beside,
    pair_keys_options,
    system_prompt_option,
)
from mlflow_safelock.cli.output import announce
from mlflow_safelock.loading import ModelLoading, is_mlflow_model, load_lock_reference

if TYPE_CHECKING:
    from mlflow_safelock.evaluate import Settings, Subject, Suite
    from mlflow_safelock.forging import PreferencePair

F = TypeVar("F", bound=Callable[..., Any])

EXPERIMENT = "safelock-evaluations"
"""MLflow experiment of what was measured, where none is named."""


@dataclass(frozen=True)
class Measuring:
    """What a model is asked, under which lock, and how its answers are made and judged.

    Attributes:
        lock_reference: Lock file or URI; ``None``: that of a locked version.
        suite_name: The suite, as the user named it.
        column: Column of its prompts.
        judge_name: The judge, as the user named it.
        limit: How many prompts are drawn.
        max_new_tokens: Longest answer.
        system_prompt: System prompt of every chat.
        seed: Of the draw and of the intervals.
        batch_size: Prompts at once.
        experiment: MLflow experiment of the run; ``None``: no run is logged.
        forged_from: File of the pairs that the lock was forged from.
        keys: Under which keys files of pairs hold them: question, safe answer, unsafe answer.
    """

    lock_reference: str | None
    suite_name: str
    column: str | None
    judge_name: str
    limit: int | None
    max_new_tokens: int
    system_prompt: str | None
    seed: int
    batch_size: int
    experiment: str | None
    forged_from: Path | None
    keys: tuple[str, str, str]

    def pairs(self) -> tuple[PreferencePair, ...]:
        """What the lock was forged from, where that is given."""
        from mlflow_safelock.forging import PairKeys, load_pairs

        return load_pairs(self.forged_from, PairKeys(*self.keys)) if self.forged_from else ()

    def suite(self) -> Suite:
        """The suite."""
        from mlflow_safelock.evaluate import load_suite

        return load_suite(self.suite_name, self.column)

    def reach(self, model: str, mlflow_address: MlflowAddress) -> None:
        """Know that MLflow answers, where it is needed: for the model, its lock, the judge or the run.

        Raises:
            SourceError: It does not.
        """
        named = (model, self.lock_reference or "", self.judge_name)
        if self.experiment is not None or any(is_mlflow_model(one) for one in named):
            mlflow_address.reach()

    def open(
        self, model: str, alpha: float | None, loading: ModelLoading, *, every_byte: bool = False
    ) -> Subject:
        """The model under its lock; where it is in MLflow, ``reach`` comes first.

        With ``every_byte`` all of its files are in its fingerprint, and not blocks of them.

        Raises:
            SourceError: The model cannot be read.
        """
        from mlflow_safelock.evaluate import open_subject

        announce(f"Loading {model}")
        lock = load_lock_reference(self.lock_reference) if self.lock_reference else None
        return open_subject(model, loading, every_byte=every_byte).with_lock(lock, alpha)

    def settings(self, output: Path) -> Settings:
        """How to measure, its judge loaded; answers are kept beside the result in ``output``."""
        from mlflow_safelock.evaluate import Settings, find_judge

        return Settings(
            judge=find_judge(self.judge_name),
            limit=self.limit,
            seed=self.seed,
            system_prompt=self.system_prompt,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            answers=beside(output, "answers"),
        )


def measuring_options(function: F) -> F:
    """The options of commands that measure a model; the command gets them as ``measuring``."""

    def with_measuring(
        *arguments: Any,
        lock_reference: str | None,
        suite_name: str,
        column: str | None,
        judge_name: str,
        limit: int | None,
        max_new_tokens: int,
        system_prompt: str | None,
        seed: int,
        batch_size: int,
        experiment: str,
        no_mlflow: bool,
        forged_from: Path | None,
        keys: tuple[str, str, str],
        **values: Any,
    ) -> Any:
        measuring = Measuring(
            *(lock_reference, suite_name, column, judge_name, limit, max_new_tokens),
            *(system_prompt, seed, batch_size, None if no_mlflow else experiment),
            *(forged_from, keys),
        )
        return function(*arguments, measuring=measuring, **values)

    with_measuring.__doc__ = function.__doc__
    with_measuring.__name__ = function.__name__
    with_measuring.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        pair_keys_options,
        click.option(
            "--forged-from",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            metavar="FILE",
            help="The pairs that the lock was forged from, to find prompts that it knows.",
        ),
        click.option("--no-mlflow", is_flag=True, help="Log no MLflow run."),
        click.option(
            "--experiment",
            default=EXPERIMENT,
            show_default=True,
            metavar="NAME",
            help="MLflow experiment to log a run to.",
        ),
        batch_size_option,
        click.option(
            "--seed",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Of every draw and of the intervals.",
        ),
        system_prompt_option,
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            default=128,
            show_default=True,
            help="Longest answer.",
        ),
        click.option(
            "--limit", type=click.IntRange(min=1), help="Draw this many prompts of the suite.  [default: all]"
        ),
        click.option(
            "--judge",
            "judge_name",
            default="refusal-match",
            show_default=True,
            metavar="JUDGE",
            help="Who calls answers harmful: refusal-match, classifier:PATH[#LABEL], guard:PATH, score:PATH, "
            "or the URI of a model in MLflow.",
        ),
        click.option(
            "--column", metavar="NAME", help="Column of a .jsonl or .csv file that holds the prompts."
        ),
        click.option(
            "--suite",
            "suite_name",
            required=True,
            metavar="SUITE",
            help="A shipped suite, a folder with a manifest, a .jsonl or a .csv file.",
        ),
        click.option(
            "--lock",
            "lock_reference",
            metavar="LOCK",
            help="Lock file or MLflow URI.  [default: that of a locked version]",
        ),
    ):
        with_measuring = option(with_measuring)
    return with_measuring  # type: ignore[return-value]
