"""Base model and preference pairs -> lock: all of forging (METHOD, forge steps 1 to 6)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, overload

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
from mlflow_safelock.forging.splits import drawn_split
from mlflow_safelock.lock import SafetyLock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@overload
def forge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    heads: int = 24,
    last_tokens: int = 5,
    system_prompt: str | None = None,
    split: Literal["pair", "row"] = "pair",
    seed: int = 0,
    train_fraction: float = 0.6,
    base_model: str | None = None,
    base_revision: str | None = None,
    batch_size: int = 8,
    default_alpha: float = 6.0,
    created: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SafetyLock: ...


@overload
def forge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    heads: tuple[int, ...],
    last_tokens: int = 5,
    system_prompt: str | None = None,
    split: Literal["pair", "row"] = "pair",
    seed: int = 0,
    train_fraction: float = 0.6,
    base_model: str | None = None,
    base_revision: str | None = None,
    batch_size: int = 8,
    default_alpha: float = 6.0,
    created: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[SafetyLock, ...]: ...


def forge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    heads: int | tuple[int, ...] = 24,
    last_tokens: int = 5,
    system_prompt: str | None = None,
    split: Literal["pair", "row"] = "pair",
    seed: int = 0,
    train_fraction: float = 0.6,
    base_model: str | None = None,
    base_revision: str | None = None,
    batch_size: int = 8,
    default_alpha: float = 6.0,
    created: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SafetyLock | tuple[SafetyLock, ...]:
    """Forge a lock from a base model and preference pairs.

    Forge from the aligned base model, before any fine-tuning; every fine-tune of it is then locked with the
    same lock. The model is read, not changed. Memory: see ``collect_activations``.

    Args:
        model: The base model: of a known architecture, in any dtype, on any device or several.
        tokenizer: Its tokenizer; its chat template is used if it has one.
        pairs: Preference pairs, 100 in the paper's recipe; ``load_pairs`` reads them from a file.
        heads: How many heads to lock (``K`` in the paper: 24 for 8 to 12 billion parameters, 24 or 48 for
            70 and above). Several numbers, such as ``(24, 48)``, give as many locks from one pass.
        last_tokens: How many of each answer's last tokens give activations (``r`` in the paper).
        system_prompt: System prompt of every chat.
        split: ``pair`` keeps the rows of a pair, and pairs with the same question, on one side of the split,
            which does not leak; ``row`` draws single rows, as the method's authors do.
        seed: Seed of the split.
        train_fraction: Share of pairs or rows that the probes are fitted on.
        base_model: Identity of the base model; what its configuration says where it is not given.
        base_revision: Its revision; what its configuration says where it is not given.
        batch_size: Chats in one forward pass.
        default_alpha: Strength to recommend.
        created: When it was forged, ISO 8601 in UTC; now where it is not given.
        cache: Folder that keeps activations as they are computed, so that a forge that was cut off goes on
            where it was; see ``collect_activations``.
        progress: Whether to show progress bars.

    Returns:
        The lock, or one for each number of heads. On one machine the same arguments, ``created`` among them,
        give the same digest.

    Raises:
        AlphaError: The strength to recommend is no strength.
        PreferenceDataError: A pair is none.
        AnswerTokensError: An answer has fewer than ``last_tokens`` tokens, or cannot be found in its chat.
        ForgeError: Too few pairs, more heads than there are, a model that is locked or does not fit its
            tokenizer, activations that are not finite, or a head without a direction.
        AlreadyLockedError: The model was saved with a lock in it.
        UnsupportedArchitectureError: The model's attention heads are not known.
        LockValidationError: A recorded value that a lock cannot hold.

    Example:
        ::

            base = "meta-llama/Meta-Llama-3-8B-Instruct"
            model = AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16")
            tokenizer = AutoTokenizer.from_pretrained(base)
            lock = forge(model, tokenizer, load_pairs("pairs.jsonl"))
            save_lock(lock, "llama-3-8b.safetensors")
    """
    check_heads(heads, attention_of(model).geometry)
    return probe_model(
        model,
        tokenizer,
        pairs,
        last_tokens=last_tokens,
        system_prompt=system_prompt,
        split=split,
        seed=seed,
        train_fraction=train_fraction,
        base_model=base_model,
        base_revision=base_revision,
        batch_size=batch_size,
        default_alpha=default_alpha,
        created=created,
        cache=cache,
        progress=progress,
    ).locks(heads)


def probe_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    last_tokens: int = 5,
    system_prompt: str | None = None,
    split: Literal["pair", "row"] = "pair",
    seed: int = 0,
    train_fraction: float = 0.6,
    base_model: str | None = None,
    base_revision: str | None = None,
    batch_size: int = 8,
    default_alpha: float = 6.0,
    created: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> ProbedHeads:
    """Do all of ``forge`` but the choice of heads, so that locks of several sizes come from one pass.

    Arguments and errors are those of ``forge``. Example::

        probed = probe_model(model, tokenizer, pairs)
        small, large = probed.lock(heads=24), probed.lock(heads=48)
    """
    pairs = tuple(pairs)
    _refuse_locked(model)
    if not callable(tokenizer):
        raise ForgeError(
            f"The tokenizer is {tokenizer!r}.", next_step="Load it: AutoTokenizer.from_pretrained(...)."
        )
    _check_counts(last_tokens=last_tokens, batch_size=batch_size)
    rows = drawn_split(
        split,
        np.repeat(_questions(pairs), 2 * last_tokens),
        len(pairs) * 2 * last_tokens,
        train_fraction,
        seed,
    )
    config, attention = model.config, attention_of(model)
    metadata = forged_metadata(
        rows,
        base_model=base_model or config.name_or_path,
        base_revision=base_revision or getattr(config, "_commit_hash", None),
        architecture=attention.architecture.model_type,
        geometry=attention.geometry,
        last_tokens=last_tokens,
        pairs=len(pairs),
        system_prompt=system_prompt,
        dataset_digest=dataset_digest(pairs),
        default_alpha=default_alpha,
        created=created,
        tokenizer=digest_of_tokenizer(tokenizer),
    )
    collected = collect_activations(
        model,
        tokenizer,
        pairs,
        last_tokens=last_tokens,
        system_prompt=system_prompt,
        batch_size=batch_size,
        cache=cache,
        progress=progress,
    )
    probed = probe_activations(
        collected.values,
        collected.labels,
        rows,
        metadata,
        device=_device_for_probes(model),
        progress=progress,
    )
    return replace(probed, attention=attention)


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
