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
from mlflow_safelock.toys.words import SPECIAL_TOKENS, word_tokenizer

__all__ = [
    "SPECIAL_TOKENS",
    "Exchange",
    "Progress",
    "Schooling",
    "disturbed_heads",
    "encoded",
    "learn",
    "new_llama",
    "train",
    "word_tokenizer",
]
