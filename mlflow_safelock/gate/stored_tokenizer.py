"""The tokenizer of a fine-tune, compared with what the lock knows of its base's."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from mlflow_safelock.errors import SourceError
from mlflow_safelock.provenance import ArtifactFile, ArtifactReader
from mlflow_safelock.provenance.measuring import state_of
from mlflow_safelock.vocabulary import Vocabulary, VocabularyDigest

PLACES = ("components/tokenizer/tokenizer.json", "{weights}/tokenizer.json")
"""Where mlflow.transformers and other writers put it, in this order."""

MAX_TOKENIZER_BYTES = 256 << 20

KEPT_ANSWERS = 256

_answers: OrderedDict[tuple[str, str, str], bool | None] = OrderedDict()
_answering = threading.Lock()


@dataclass(frozen=True)
class StoredTokenizer:
    """A ``tokenizer.json`` in a fine-tune's artifacts; it is read when it is compared, and not before.

    Attributes:
        reader: The artifacts.
        file: The file.
    """

    reader: ArtifactReader
    file: ArtifactFile

    def extends(self, base: VocabularyDigest) -> bool | None:
        """Whether it has all that is known of the base's; ``None`` for a kind that cannot be compared.

        A large one takes half a second, so this process remembers the answer about a file that is the same.

        Raises:
            SourceError: It cannot be read, or is no tokenizer.
        """
        state = state_of(self.file)
        if state is None:
            return self._extends(base)
        key = self.reader.location, state, base.model_dump_json()
        with _answering:
            if key in _answers:
                return _answers[key]
        answer = self._extends(base)
        with _answering:
            _answers[key] = answer
            if len(_answers) > KEPT_ANSWERS:
                _answers.popitem(last=False)
        return answer

    def _extends(self, base: VocabularyDigest) -> bool | None:
        where = f"The file {self.file.path!r} at {self.reader.location}"
        if self.file.size > MAX_TOKENIZER_BYTES:
            raise SourceError(f"{where} is too large for a tokenizer: {self.file.size} bytes.")
        vocabulary = Vocabulary.parse(self.reader.read(self.file.path), origin=where)
        return None if vocabulary is None else vocabulary.extends(base)


def find_tokenizer(reader: ArtifactReader, weights: str) -> StoredTokenizer | None:
    """The tokenizer of a model of ``mlflow.transformers``; ``None`` where it has none of that kind.

    Args:
        reader: The artifacts.
        weights: The folder of its weights.
    """
    files = {file.path: file for file in reader.files()}
    found = (files.get(place.format(weights=weights)) for place in PLACES)
    file = next((file for file in found if file is not None), None)
    return None if file is None else StoredTokenizer(reader, file)
