"""Proof that a locked checkpoint is locked: it is loaded by stock ``transformers`` and compared.

``transformers`` drops a bias silently when the configuration does not ask for it, and a locked folder that
reloads unlocked is the worst failure of all. So what counts is what it loads, not what was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mlflow_safelock.apply.in_memory import apply_lock
from mlflow_safelock.errors import CheckpointError
from mlflow_safelock.lock import SafetyLock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUNDINGS = 8.0
"""Accepted difference of logits, in unit roundoffs of their dtype, relative to the largest."""

PLAIN = 2.0**-18
"""Accepted difference of biases: the sums in memory are in float32."""

DEQUANTISED = 2.0**-7
"""The same where ``transformers`` rounds the weights to 16 bits first, as it does with eight-bit ones."""

_PROBE_SHAPE = (2, 16)


@dataclass(frozen=True)
class Confirmation:
    """What a check found.

    Attributes:
        kind: Which check.
        check: The check, in words.
        max_logit_difference: Largest difference to the source with the lock applied in memory; ``None``
            where it was not loaded.
        max_logit_change: Largest change that the lock makes; ``None`` where it was not loaded.
    """

    kind: Literal["reload", "structure"]
    check: str
    max_logit_difference: float | None
    max_logit_change: float | None


def confirm_by_reloading(
    source: Path, locked: Path, lock: SafetyLock, alpha: float, slack: float = PLAIN
) -> Confirmation:
    """Compare a locked checkpoint, loaded by stock ``transformers``, with its source locked in memory.

    Every tensor and the logits of a few random tokens are compared. Needs memory for both models.

    Args:
        source: The unlocked checkpoint.
        locked: The locked one.
        lock: The lock.
        alpha: Its strength.
        slack: Accepted difference of biases beyond their rounding, relative to the largest of a layer.

    Raises:
        CheckpointError: They are not the same model.
    """
    with _no_progress_bars():
        expected, expected_report = _load(source)
        probe = _probe_tokens(expected)
        unlocked_logits = _logits(expected, probe)
        apply_lock(expected, lock, alpha)
        found, found_report = _load(locked)
    _compare_reports(expected_report, found_report)
    _compare_tensors(expected, found, slack)
    expected_logits, found_logits = _logits(expected, probe), _logits(found, probe)
    _refuse_no_numbers(unlocked_logits, expected_logits, alpha)
    difference = float((found_logits - expected_logits).abs().max())
    allowed = _ROUNDINGS * torch.finfo(found.dtype).eps * float(expected_logits.abs().max())
    if not difference <= allowed:
        raise CheckpointError(
            f"The locked checkpoint reloads with logits that differ by {difference:.3g} from those of the "
            f"model locked in memory, and {allowed:.3g} is allowed."
        )
    return Confirmation(
        kind="reload",
        check=(
            f"reloaded with transformers {transformers.__version__}: every tensor and the logits of "
            f"{probe.numel()} tokens compared with the source locked in memory"
        ),
        max_logit_difference=difference,
        max_logit_change=float((expected_logits - unlocked_logits).abs().max()),
    )


def _refuse_no_numbers(unlocked: torch.Tensor, locked: torch.Tensor, alpha: float) -> None:
    """Refuse a lock that leaves nothing of a model that says something."""
    dead = not locked.isfinite().all() or (unlocked.any() and not locked.any())
    if unlocked.isfinite().all() and dead:
        raise CheckpointError(
            f"At alpha {alpha:g} the locked model says nothing: its logits are all zero, or no numbers.",
            next_step="Use a smaller alpha; the method's default is 6.0.",
        )


def _load(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # each model class has its own ways to reject a checkpoint
        raise CheckpointError(f"transformers cannot load {folder}: {error}") from error
    return model.eval(), report


def _probe_tokens(model: PreTrainedModel) -> torch.Tensor:
    config = model.config
    rows, width = _PROBE_SHAPE
    generator = torch.Generator().manual_seed(0)
    shape = (rows, min(width, getattr(config, "max_position_embeddings", width)))
    return torch.randint(config.vocab_size, shape, generator=generator)


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    try:
        logits: torch.Tensor = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    except Exception as error:  # each model class has its own ways to fail
        raise CheckpointError(
            f"The {type(model).__name__} of {model.name_or_path} cannot be run on {tokens.numel()} tokens: "
            f"{error}.",
            next_step="See whether the fine-tune itself runs: load it with transformers and generate.",
        ) from error
    return logits.float()


def _compare_reports(expected: dict[str, Any], found: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        new = set(found[kind]) - set(expected[kind])
        if new:
            raise CheckpointError(
                f"The locked checkpoint does not load as it should: {kind.replace('_', ' ')} "
                f"{sorted(map(str, new))[:3]}."
            )


def _compare_tensors(expected: PreTrainedModel, found: PreTrainedModel, slack: float) -> None:
    expected_tensors, found_tensors = expected.state_dict(), found.state_dict()
    lost = sorted(set(expected_tensors) - set(found_tensors))
    if lost:
        raise CheckpointError(f"The locked checkpoint reloads without {lost[0]}.")
    for name, tensor in found_tensors.items():
        reference = expected_tensors.get(name)
        if reference is None:
            same = not tensor.any()  # a bias that the configuration's flag asks for
        elif name.endswith(".bias"):
            same = _equal_but_for_rounding(tensor, reference, slack)
        else:
            same = _is_same(tensor, reference)
        if not same:
            raise CheckpointError(f"The locked checkpoint reloads with another {name} than it should have.")


def _is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are the same to the last bit, also where they hold no numbers."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    one, other = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (found, expected))
    return torch.equal(one, other)


def _equal_but_for_rounding(found: torch.Tensor, expected: torch.Tensor, slack: float) -> bool:
    # Biases are computed twice, on the disk in float64 and in memory in less, and cancellation shows that.
    if found.dtype != expected.dtype or not found.is_floating_point():
        return torch.equal(found, expected)
    tolerance = slack * float(expected.abs().max())
    rounding = 2 * torch.finfo(found.dtype).eps
    return torch.allclose(found.double(), expected.double(), rtol=rounding, atol=tolerance)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
