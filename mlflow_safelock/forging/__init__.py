"""From a base model and preference pairs to a lock (METHOD, "Forge").

The names below load what they need when they are first used: pairs can be read without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow_safelock.forging.activations import HeadActivations, collect_activations
    from mlflow_safelock.forging.answer_tokens import AnswerTokens, last_answer_tokens
    from mlflow_safelock.forging.enrolment import enroll
    from mlflow_safelock.forging.from_activations import forge_from_activations, probe_activations
    from mlflow_safelock.forging.from_model import forge, probe_model
    from mlflow_safelock.forging.making import UNKNOWN_BASE
    from mlflow_safelock.forging.preferences import PairKeys, PreferencePair, dataset_digest, load_pairs
    from mlflow_safelock.forging.probed_heads import ProbedHeads
    from mlflow_safelock.forging.probes import ProbeScores, score_heads
    from mlflow_safelock.forging.probing import forge_each
    from mlflow_safelock.forging.settings import ForgeSettings, Probing
    from mlflow_safelock.forging.splits import RowSplit, given_split, split_by_pair, split_by_row
    from mlflow_safelock.forging.starter import starter_preference_pairs

_HOMES = {
    "AnswerTokens": "answer_tokens",
    "ForgeSettings": "settings",
    "HeadActivations": "activations",
    "PairKeys": "preferences",
    "PreferencePair": "preferences",
    "ProbeScores": "probes",
    "ProbedHeads": "probed_heads",
    "Probing": "settings",
    "RowSplit": "splits",
    "UNKNOWN_BASE": "making",
    "collect_activations": "activations",
    "dataset_digest": "preferences",
    "enroll": "enrolment",
    "forge": "from_model",
    "forge_each": "probing",
    "forge_from_activations": "from_activations",
    "given_split": "splits",
    "last_answer_tokens": "answer_tokens",
    "load_pairs": "preferences",
    "probe_activations": "from_activations",
    "probe_model": "from_model",
    "score_heads": "probes",
    "split_by_pair": "splits",
    "split_by_row": "splits",
    "starter_preference_pairs": "starter",
}

__all__ = [
    "UNKNOWN_BASE",
    "AnswerTokens",
    "ForgeSettings",
    "HeadActivations",
    "PairKeys",
    "PreferencePair",
    "ProbeScores",
    "ProbedHeads",
    "Probing",
    "RowSplit",
    "collect_activations",
    "dataset_digest",
    "enroll",
    "forge",
    "forge_each",
    "forge_from_activations",
    "given_split",
    "last_answer_tokens",
    "load_pairs",
    "probe_activations",
    "probe_model",
    "score_heads",
    "split_by_pair",
    "split_by_row",
    "starter_preference_pairs",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
