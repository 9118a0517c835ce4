"""Forging a lock from the command line: what ``safelock forge`` and ``safelock run`` have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_safelock.cli.options import MlflowAddress
from mlflow_safelock.cli.output import announce
from mlflow_safelock.errors import LockMismatchError, PreferenceDataError
from mlflow_safelock.loading import ModelLoading, is_mlflow_model, load_language_model

if TYPE_CHECKING:
    from mlflow_safelock.forging import ForgeSettings, PreferencePair, Probing
    from mlflow_safelock.lock import AttentionGeometry, SafetyLock


@dataclass(frozen=True)
class ForgeRequest:
    """Everything that decides a lock.

    Attributes:
        model: Folder, hub id or MLflow URI of the base model.
        data: File of preference pairs; ``None`` for the starter pairs.
        keys: Names of its columns: question, safe answer, unsafe answer.
        max_pairs: Use the first so many pairs only; ``None`` for all.
        heads: Heads to lock, one lock for each number.
        probings: How rows are taken and split for the probes, locks for each; from one reading.
        settings: What the locks have in common; without ``base_model``, what the model says it is called.
        geometry: Attention shape that it must have; ``None`` for any.
        loading: How the model is loaded.
    """

    model: str
    data: Path | None
    keys: tuple[str, str, str]
    max_pairs: int | None
    heads: tuple[int, ...]
    probings: tuple[Probing, ...]
    settings: ForgeSettings
    geometry: AttentionGeometry | None
    loading: ModelLoading


def forge_locks(request: ForgeRequest, mlflow_address: MlflowAddress) -> tuple[SafetyLock, ...]:
    """Load the base model and the pairs, and forge: probing by probing, and in each by number of heads.

    Raises:
        SafelockError: The model or the pairs cannot be used, or forging failed.
        click.UsageError: It is not known what the base is called.
    """
    pairs = _pairs(request)
    announce(f"Loading {request.model}")
    from mlflow_safelock.apply import attention_of
    from mlflow_safelock.forging import forge_each

    if is_mlflow_model(request.model):
        mlflow_address.reach()
    base = load_language_model(request.model, request.loading)
    geometry = attention_of(base.model).geometry
    name = request.settings.base_model or base.identity
    if name is None:
        raise click.UsageError(
            f"{request.model} does not say what it is called: give --base-model, its hub id."
        )
    if request.geometry not in (None, geometry):
        raise LockMismatchError(
            f"{request.model} has {geometry}, and the recipe is for {request.geometry}.",
            next_step=f"Give the weights of {name}: --model.",
        )
    count = len(request.probings) * len(request.heads)
    what = "the lock" if count == 1 else f"{count} locks"
    announce(f"Forging {what} of {name} from {len(pairs)} pairs")
    return forge_each(
        base.model,
        base.tokenizer,
        pairs,
        request.probings,
        heads=request.heads,
        settings=replace(request.settings, base_model=name),
    )


def _pairs(request: ForgeRequest) -> tuple[PreferencePair, ...]:
    from mlflow_safelock.forging import PairKeys, load_pairs, starter_preference_pairs

    if request.data is None:
        pairs = starter_preference_pairs()
        source = "the starter pairs of this package"
        click.echo(f"No --data: using {source}. Pairs on your own subjects make a better lock.", err=True)
    else:
        question, safe, unsafe = request.keys
        pairs = load_pairs(request.data, PairKeys(question=question, safe=safe, unsafe=unsafe))
        source = str(request.data)
    if request.max_pairs is None:
        return pairs
    if len(pairs) < request.max_pairs:
        raise PreferenceDataError(
            f"The recipe wants {request.max_pairs} pairs, and {source} has {len(pairs)}.",
            next_step=f"Give more, or --set forge.pairs={len(pairs)}.",
        )
    return pairs[: request.max_pairs]
