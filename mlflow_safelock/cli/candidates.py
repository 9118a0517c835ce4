"""The locks that ``safelock sweep`` tries: one that is given, or several that it forges from one reading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from mlflow_safelock.cli.forge_request import ForgeRequest, forge_locks
from mlflow_safelock.cli.measuring import Measuring
from mlflow_safelock.cli.options import (
    MlflowAddress,
    base_model_option,
    base_revision_option,
    cache_option,
    data_option,
    given_options,
)
from mlflow_safelock.loading import ModelLoading

if TYPE_CHECKING:
    from mlflow_safelock.forging import PreferencePair
    from mlflow_safelock.lock import SafetyLock

F = TypeVar("F", bound=Callable[..., Any])

USUAL_HEADS = (24,)
"""Numbers of heads of locks that are forged, where none is given."""


@dataclass(frozen=True)
class Forging:
    """How the locks are forged.

    Attributes:
        base: Folder, hub id or MLflow URI of the base model.
        data: File of preference pairs; ``None`` for the starter pairs.
        last_tokens: Numbers of each answer's last tokens.
        splits: Kinds of split.
        train_fractions: Shares that the probes are fitted on.
        seeds: Seeds of the split.
        base_model: What the base is called; ``None`` for what it says.
        base_revision: Its revision.
        cache: Folder that keeps activations.
    """

    base: str
    data: Path | None
    last_tokens: tuple[int, ...]
    splits: tuple[Literal["pair", "row"], ...]
    train_fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    base_model: str | None
    base_revision: str | None
    cache: Path | None

    def pairs(self, measuring: Measuring) -> tuple[PreferencePair, ...]:
        """The pairs; none where they are the starter pairs, which are known."""
        from mlflow_safelock.forging import PairKeys, load_pairs

        return load_pairs(self.data, PairKeys(*measuring.keys)) if self.data else ()

    def locks(
        self, heads: tuple[int, ...], measuring: Measuring, loading: ModelLoading, address: MlflowAddress
    ) -> tuple[SafetyLock, ...]:
        """One lock for each number of last tokens, split, share, seed and number of heads.

        The base is loaded and read once, and is gone from memory afterwards.

        Raises:
            SafelockError: The base or the pairs cannot be used, or forging failed.
            click.UsageError: It is not known what the base is called.
        """
        import gc

        from mlflow_safelock.forging import ForgeSettings, Probing

        points = product(self.last_tokens, self.splits, self.train_fractions, self.seeds)
        request = ForgeRequest(
            model=self.base,
            data=self.data,
            keys=measuring.keys,
            max_pairs=None,
            heads=tuple(sorted(set(heads))) or USUAL_HEADS,
            probings=tuple(dict.fromkeys(Probing(*point) for point in points)),
            settings=ForgeSettings(
                system_prompt=measuring.system_prompt,
                base_model=self.base_model,
                base_revision=self.base_revision,
                batch_size=measuring.batch_size,
                cache=self.cache,
            ),
            geometry=None,
            loading=loading,
        )
        locks = forge_locks(request, address)
        gc.collect()  # modules refer to each other, and the fine-tune needs the room
        return locks


def listed(kind: Callable[[str], Any], example: str) -> Any:
    """A callback of an option that may be given several times, and with commas between its values."""

    def read(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> tuple[Any, ...]:
        try:
            return tuple(kind(part.strip()) for text in texts for part in text.split(","))
        except ValueError as error:
            raise click.BadParameter(f"{','.join(texts)!r} is not a list such as {example}.") from error

    return read


def forging_options(function: F) -> F:
    """The options of locks that are forged; the command gets them as ``forging``, ``None`` without a base."""

    def with_forging(
        *arguments: Any,
        forge: str | None,
        data: Path | None,
        last_tokens: tuple[int, ...],
        split: tuple[Literal["pair", "row"], ...],
        train_fraction: tuple[float, ...],
        split_seed: tuple[int, ...],
        base_model: str | None,
        base_revision: str | None,
        cache: Path | None,
        **values: Any,
    ) -> Any:
        if forge is None:
            _refuse_forge_options()
            return function(*arguments, forging=None, **values)
        if not forge.strip():
            raise click.UsageError("--forge names no base model: it is empty.")
        forging = Forging(
            *(forge, data, last_tokens, split, train_fraction),
            *(split_seed, base_model, base_revision, cache),
        )
        return function(*arguments, forging=forging, **values)

    with_forging.__doc__ = function.__doc__
    with_forging.__name__ = function.__name__
    with_forging.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        cache_option,
        base_revision_option,
        base_model_option,
        click.option(
            "--split-seed",
            multiple=True,
            default=("0",),
            show_default="0",
            metavar="S,…",
            callback=listed(_from_zero, "0,1"),
            help="Seeds of the split.",
        ),
        click.option(
            "--train-fraction",
            multiple=True,
            default=("0.6",),
            show_default="0.6",
            metavar="F,…",
            callback=listed(_share, "0.6,0.8"),
            help="Shares that the probes are fitted on.",
        ),
        click.option(
            "--split",
            multiple=True,
            default=("pair",),
            show_default="pair",
            metavar="pair,row",
            callback=listed(_split, "pair,row"),
            help="How rows are split for the probes.",
        ),
        click.option(
            "--last-tokens",
            multiple=True,
            default=("5",),
            show_default="5",
            metavar="R,…",
            callback=listed(_from_one, "3,5"),
            help="How many of each answer's last tokens give activations.",
        ),
        data_option,
        click.option(
            "--forge",
            metavar="BASE",
            help="Forge the locks from this base model, in place of --lock: one for each of --last-tokens, "
            "--split, --train-fraction, --split-seed and --heads, from one reading.",
        ),
    ):
        with_forging = option(with_forging)
    return with_forging  # type: ignore[return-value]


_FORGE_ONLY = (
    *("data", "last_tokens", "split", "train_fraction"),
    *("split_seed", "base_model", "base_revision", "cache"),
)


def _refuse_forge_options() -> None:
    given = given_options(*_FORGE_ONLY)
    if given:
        raise click.UsageError(f"{given[0]} is for locks that are forged: name their base, --forge.")


def _from_one(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _from_zero(text: str) -> int:
    if int(text) < 0:
        raise ValueError
    return int(text)


def _share(text: str) -> float:
    if not 0.0 < float(text) < 1.0:
        raise ValueError
    return float(text)


def _split(text: str) -> str:
    if text not in ("pair", "row"):
        raise ValueError
    return text
