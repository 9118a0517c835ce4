"""What a lock keeps of its base's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_safelock.vocabulary import Vocabulary, VocabularyDigest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILE = "tokenizer.json"


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> VocabularyDigest | None:
    """The digest of a loaded tokenizer's vocabulary; ``None`` for one of another library than ``tokenizers``.

    Raises:
        SourceError: Its vocabulary is none that can be.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    vocabulary = Vocabulary.parse(backend.to_str(), origin=f"The {type(tokenizer).__name__}")
    return None if vocabulary is None else vocabulary.digest()


def tokenizer_in(folder: Path) -> VocabularyDigest | None:
    """The digest of the vocabulary in a model's folder; ``None`` where it has no ``tokenizer.json``.

    Raises:
        SourceError: That file is none.
    """
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        return None
    vocabulary = Vocabulary.parse(file.read_bytes(), origin=f"The file {file}")
    return None if vocabulary is None else vocabulary.digest()
