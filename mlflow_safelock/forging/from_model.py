"""Base model and preference pairs -> lock: all of forging (METHOD, forge steps 1 to 6)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from mlflow_safelock.apply import attention_of
from mlflow_safelock.forging.preferences import PreferencePair
from mlflow_safelock.forging.probed_heads import ProbedHeads, check_heads
from mlflow_safelock.forging.probing import probe_each
from mlflow_safelock.forging.settings import USUAL, USUAL_PROBING, ForgeSettings, Probing
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
    probing = Probing(last_tokens, split, train_fraction, seed)
    settings = ForgeSettings(
        system_prompt=system_prompt,
        base_model=base_model,
        base_revision=base_revision,
        default_alpha=default_alpha,
        created=created,
        batch_size=batch_size,
        cache=cache,
        progress=progress,
    )
    return probe_model(model, tokenizer, pairs, probing, settings).locks(heads)


def probe_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    probing: Probing = USUAL_PROBING,
    settings: ForgeSettings = USUAL,
) -> ProbedHeads:
    """Do all of ``forge`` but the choice of heads, so that locks of several sizes come from one pass.

    Errors are those of ``forge``. Example::

        probed = probe_model(model, tokenizer, pairs)
        small, large = probed.lock(heads=24), probed.lock(heads=48)
    """
    return next(probe_each(model, tokenizer, pairs, [probing], settings))
