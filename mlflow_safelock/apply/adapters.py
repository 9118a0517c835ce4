"""Which PEFT adapters leave a lock what it is, as far as it can be told by looking at them.

A lock adds a constant to what goes into a projection. What an adapter makes of it is told by the projection
with the adapter on it, asked once; but only where that is a linear map of its input. An adapter that adds a
constant can take the lock back, one that chooses by its input what it does can do so when nobody looks, and
one that other tokens switch on is off when it is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from mlflow_safelock.errors import VerificationError

if TYPE_CHECKING:
    from torch import nn

LINEAR = frozenset(
    {
        *("ADALORA", "BOFT", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "IA3", "LOHA", "LOKR", "LORA"),
        *("OFT", "OSF", "RANDLORA", "TINYLORA", "UNILORA", "VERA"),
    }
)
"""Kinds of PEFT by which a projection remains a linear map of its input, with a constant if it has a bias."""

OF_PROMPTS = frozenset({"CPT", "MULTITASK_PROMPT_TUNING", "PROMPT_TUNING", "P_TUNING"})
"""Kinds that leave the weights alone and give the model no more than embeddings of further tokens. By a
prefix of keys and values a head could be made to give any constant."""

MERGE = "Merge it, where its kind can be (model.merge_and_unload()), and log that; or train a LoRA adapter."


def why_untold(config: Mapping[str, Any]) -> str | None:
    """Why it cannot be told what an adapter leaves of a lock, to go on from "the adapter"; ``None``: it can.

    Args:
        config: Its configuration, as PEFT writes it.
    """
    kind = config.get("peft_type")
    name = str(getattr(kind, "value", kind))
    if name not in LINEAR | OF_PROMPTS:
        return f"is of the kind {name}, which may do anything to what a lock adds"
    if config.get("alora_invocation_tokens"):
        return "is switched on by tokens in a prompt (alora_invocation_tokens)"
    if config.get("arrow_config"):
        return "chooses by its input what it does (arrow_config)"
    if config.get("lora_bias"):
        return "adds a constant to what it changes (lora_bias)"
    if "bias" in str(config.get("target_parameters")):
        return "changes biases (target_parameters)"
    return None


def refuse_untold_adapters(model: nn.Module) -> None:
    """Raise where a loaded model has an adapter of which it cannot be told what it leaves of a lock.

    Raises:
        VerificationError: It has, or an adapter on one.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        why = why_untold(config.to_dict())
        if why is not None:
            raise VerificationError(f"The adapter {name!r} {why}.", next_step=MERGE)
    # transformers loads what a base's repository holds of adapters itself, onto whatever base that names.
    base = cast("Any", model).get_base_model() if hasattr(model, "get_base_model") else model
    if base is not model and getattr(base, "_hf_peft_config_loaded", False):
        raise VerificationError(
            "The adapter is on a base that has an adapter of its own, on a base that no commit is named of.",
            next_step="Merge both, model.merge_and_unload(), and log that.",
        )
