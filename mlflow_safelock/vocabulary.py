"""The vocabulary of a base model's tokenizer, as a digest that a fine-tune's tokenizer is compared with.

Fine-tunes keep their base's tokens under their numbers, and add some of their own: a padding token, markers
of a chat. So the digest is over the tokens that a base's tokenizer was trained to, with their numbers, and
over its merges in their order, and not over bytes of a file, which change whenever it is saved again. Tokens
that were added to a tokenizer, special ones among them, are left out: fine-tunes give their numbers away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mlflow_safelock.errors import SourceError

MAX_RANGES = 64
"""Most stretches of numbers that are compared; where a base has more, the longest count."""

Number = Annotated[int, Field(ge=0, lt=2**31)]


class VocabularyDigest(BaseModel):
    """What a lock keeps of its base's tokenizer.

    Attributes:
        ids: Stretches of token numbers that are compared, each its first number and the one after its last;
            ascending and apart.
        merges: How many merges are compared, from the first.
        digest: ``sha256:…`` over the tokens of those numbers and over those merges (docs/lock-format.md).
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    ids: Annotated[tuple[tuple[Number, Number], ...], Field(min_length=1, max_length=MAX_RANGES)]
    merges: Number
    digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]

    @field_validator("ids", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(tuple(one) if isinstance(one, list) else one for one in value)
        return value

    @field_validator("ids")
    @classmethod
    def _ascending_and_apart(cls, ids: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        ends = [bound for one in ids for bound in one]
        if any(first >= second for first, second in pairwise(ends)):
            raise ValueError("must be stretches of numbers that ascend and do not touch")
        return ids


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a tokenizer of the ``tokenizers`` library.

    Attributes:
        trained: The tokens of its model, by number.
        added: Tokens that were added to it, by number; some of them may be tokens of the model, too.
        merges: The merges of its model, in their order; of a model without merges, none.
    """

    trained: Mapping[int, str]
    added: Mapping[int, str]
    merges: Sequence[tuple[str, str]]

    @classmethod
    def parse(cls, text: str | bytes, *, origin: str) -> Self | None:
        """Read a ``tokenizer.json``; ``origin`` names it in errors.

        Returns:
            ``None`` for a model of a kind without a vocabulary that is known here.

        Raises:
            SourceError: It is not JSON, or not what such a file holds.
        """
        try:
            values = json.loads(text)
            model = values["model"]
            trained = _tokens(model.get("vocab"))
            if trained is None:
                return None
            added = {_number(one["id"]): _token(one["content"]) for one in values.get("added_tokens") or ()}
            return cls(trained, added, [_merge(one) for one in model.get("merges") or ()])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SourceError(
                f"{origin} is no tokenizer that can be read.",
                next_step="Save the tokenizer again with save_pretrained.",
            ) from error

    def digest(self) -> VocabularyDigest | None:
        """What a lock keeps of it; ``None`` where there is nothing to compare."""
        ids = _longest(_stretches(sorted(self.trained.keys() - self.added.keys())))
        merges = len(self.merges)
        digest = self._digest(ids, merges)
        return VocabularyDigest(ids=ids, merges=merges, digest=digest) if ids and digest else None

    def extends(self, base: VocabularyDigest) -> bool:
        """Whether it has every token of a base's under its number, and the base's merges before any other."""
        return self._digest(base.ids, base.merges) == base.digest

    @cached_property
    def _tokens(self) -> Mapping[int, str]:
        return {**self.added, **self.trained}

    def _digest(self, ids: Sequence[tuple[int, int]], merges: int) -> str | None:
        numbers = (number for first, end in ids for number in range(first, end))
        if len(self.merges) < merges or sum(end - first for first, end in ids) > len(self._tokens):
            return None
        try:
            tokens = [self._tokens[number] for number in numbers]
        except KeyError:
            return None
        state = hashlib.sha256(_joined(tokens))
        state.update(_joined(part for merge in self.merges[:merges] for part in merge))
        return f"sha256:{state.hexdigest()}"


def _joined(texts: Iterable[str]) -> bytes:
    """Each text in UTF-8 after its length in bytes, so that no two lists of texts are joined alike."""
    encoded = (text.encode("utf-8", "surrogatepass") for text in texts)
    return b"".join(len(data).to_bytes(4, "little") + data for data in encoded)


def _stretches(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where ascending numbers follow each other without a gap: the first, and the one after the last."""
    for _, stretch in groupby(enumerate(numbers), key=lambda placed: placed[1] - placed[0]):
        together = [number for _, number in stretch]
        yield together[0], together[-1] + 1


def _longest(stretches: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    by_length = sorted(stretches, key=lambda one: (one[0] - one[1], one[0]))
    return tuple(sorted(by_length[:MAX_RANGES]))


def _tokens(vocabulary: object) -> dict[int, str] | None:
    """Tokens by number: of an object from tokens to numbers, or of a list of tokens with their scores."""
    if isinstance(vocabulary, dict):
        return {_number(number): token for token, number in vocabulary.items()}
    if isinstance(vocabulary, list):
        return {number: _token(entry[0]) for number, entry in enumerate(vocabulary)}
    return None


def _merge(merge: object) -> tuple[str, str]:
    """A merge as two texts, as it is written now, or as one with a space between, as it was before."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2:
        raise ValueError(f"{merge!r} is no merge")
    return _token(parts[0]), _token(parts[1])


def _number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"{value!r} is no number of a token")
    return value


def _token(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no token")
    return value
