"""Language models that are small enough to be trained on the spot: their words, and how they learn."""

from mlflow_safelock.toys.learning import (
    Exchange,
    Progress,
    Schooling,
    disturbed_heads,
    encoded,
    learn,
    new_llama,
    train,
)
from mlflow_safelock.toys.requests import (
    BENIGN_TOOLS,
    HARMFUL_TOOLS,
    dealt,
    dealt_evenly,
    in_rounds,
    preference_pairs,
)
from mlflow_safelock.toys.words import SPECIAL_TOKENS, word_tokenizer

__all__ = [
    "BENIGN_TOOLS",
    "HARMFUL_TOOLS",
    "SPECIAL_TOKENS",
    "Exchange",
    "Progress",
    "Schooling",
    "dealt",
    "dealt_evenly",
    "disturbed_heads",
    "encoded",
    "in_rounds",
    "learn",
    "new_llama",
    "preference_pairs",
    "train",
    "word_tokenizer",
]
