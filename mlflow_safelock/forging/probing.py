"""One reading of a base model -> probed heads and locks, for one or several ways to take and split its rows.

The reading is the same whatever is made of it: the activations of fewer last tokens are a part of those of
more, and a split only says which rows the probes are fitted on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import torch

from mlflow_safelock.apply import attention_of, handle_of
from mlflow_safelock.apply.config_entry import refuse_locked_config
from mlflow_safelock.apply.placement import execution_device
from mlflow_safelock.errors import ForgeError, PreferenceDataError
from mlflow_safelock.forging.activations import collect_activations
from mlflow_safelock.forging.base_tokenizer import digest_of_tokenizer
from mlflow_safelock.forging.from_activations import probe_activations
from mlflow_safelock.forging.making import forged_metadata
from mlflow_safelock.forging.preferences import PreferencePair, dataset_digest
from mlflow_safelock.forging.probed_heads import ProbedHeads, check_heads
from mlflow_safelock.forging.settings import USUAL, ForgeSettings, Probing
from mlflow_safelock.forging.splits import RowSplit, drawn_split
from mlflow_safelock.lock import SafetyLock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


MOST_COUNTED = 65536
"""Most last tokens of an answer, and chats at once; far more than any answer has."""


def forge_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    probings: Sequence[Probing],
    *,
    heads: tuple[int, ...] = (24,),
    settings: ForgeSettings = USUAL,
) -> tuple[SafetyLock, ...]:
    """Forge several locks from one reading of a base model: one for each probing and number of heads.

    Each is the lock that ``forge`` gives for these arguments, to the last bit. An answer must have as many
    tokens as the largest ``last_tokens``. Memory: that of ``collect_activations`` for the largest
    ``last_tokens``, and a copy of the rows of the one at work.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        pairs: Preference pairs.
        probings: How rows are taken and split; those of one ``last_tokens`` are best together.
        heads: Numbers of heads.
        settings: What they have in common.

    Returns:
        The locks, probing by probing, and in each by number of heads as given.

    Raises:
        ForgeError: There is no probing. All other errors are those of ``forge``.
    """
    check_heads(heads, attention_of(model).geometry)
    found = probe_each(model, tokenizer, pairs, probings, settings)
    return tuple(lock for probed in found for lock in probed.locks(heads))


def probe_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    probings: Sequence[Probing],
    settings: ForgeSettings = USUAL,
) -> Iterator[ProbedHeads]:
    """Do all of ``forge_each`` but the choice of heads; the model is read when the first is asked for.

    Arguments and errors are those of ``forge_each``.
    """
    pairs = tuple(pairs)
    _refuse_locked(model)
    if not callable(tokenizer):
        raise ForgeError(
            f"The tokenizer is {tokenizer!r}.", next_step="Load it: AutoTokenizer.from_pretrained(...)."
        )
    if not probings:
        raise ForgeError("There must be at least one way to take and split rows.")
    for probing in probings:
        _check_counts(last_tokens=probing.last_tokens, batch_size=settings.batch_size)
    questions = _questions(pairs)
    splits = [_split_of(probing, questions) for probing in probings]
    config, attention = model.config, attention_of(model)
    when = settings.created or datetime.now(UTC).isoformat(timespec="seconds")
    about = [
        forged_metadata(
            rows,
            base_model=settings.base_model or config.name_or_path,
            base_revision=settings.base_revision or getattr(config, "_commit_hash", None),
            architecture=attention.architecture.model_type,
            geometry=attention.geometry,
            last_tokens=probing.last_tokens,
            pairs=len(pairs),
            system_prompt=settings.system_prompt,
            dataset_digest=dataset_digest(pairs),
            default_alpha=settings.default_alpha,
            created=when,
            tokenizer=digest_of_tokenizer(tokenizer),
        )
        for probing, rows in zip(probings, splits, strict=True)
    ]
    collected = collect_activations(
        model,
        tokenizer,
        pairs,
        last_tokens=max(probing.last_tokens for probing in probings),
        system_prompt=settings.system_prompt,
        batch_size=settings.batch_size,
        cache=settings.cache,
        progress=settings.progress,
    )
    last = collected
    for probing, rows, metadata in zip(probings, splits, about, strict=True):
        if last.last_tokens != probing.last_tokens:
            last = collected.last(probing.last_tokens)
        probed = probe_activations(
            last.values,
            last.labels,
            rows,
            metadata,
            device=_device_for_probes(model),
            progress=settings.progress,
        )
        yield replace(probed, attention=attention)


def _split_of(probing: Probing, questions: Sequence[int]) -> RowSplit:
    per_pair = 2 * probing.last_tokens
    return drawn_split(
        probing.split,
        np.repeat(questions, per_pair),
        len(questions) * per_pair,
        probing.train_fraction,
        probing.seed,
    )


def _refuse_locked(model: PreTrainedModel) -> None:
    refuse_locked_config(model.config, "The model")
    handle = handle_of(model)
    if handle is not None:
        raise ForgeError(
            f"The model carries a lock ({handle.lock.digest}), which changes what its heads put out.",
            next_step="Remove it first, handle_of(model).remove(), and forge from the unlocked base.",
        )


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ForgeError(f"{name} must be a whole number above zero, not {count!r}.")
        if count > MOST_COUNTED:
            raise ForgeError(f"{name} must be at most {MOST_COUNTED}, not {count}.")


def _questions(pairs: Sequence[PreferencePair]) -> list[int]:
    """A number for every pair, the same for pairs that ask the same, so that a split keeps them together."""
    for number, pair in enumerate(pairs):
        if not isinstance(pair, PreferencePair):
            raise PreferenceDataError(
                f"Pair {number} is of type {type(pair).__name__!r}, and not a PreferencePair.",
                next_step="Give PreferencePair(question, safe, unsafe), or read a file: load_pairs.",
            )
    numbers: dict[str, int] = {}
    return [numbers.setdefault(pair.question.strip(), len(numbers)) for pair in pairs]


def _device_for_probes(model: PreTrainedModel) -> torch.device:
    # Probes need float64, which not every accelerator has.
    device = execution_device(model)
    return device if device.type == "cuda" else torch.device("cpu")
