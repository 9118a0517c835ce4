"""Preference pairs: a question, a safe answer and an unsafe answer (METHOD, forge step 1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import rfc8785

from mlflow_safelock.errors import PreferenceDataError
from mlflow_safelock.forging.pair_files import Row, read_rows
from mlflow_safelock.unicode import HALF_A_CHARACTER, is_unicode


@dataclass(frozen=True)
class PreferencePair:
    """A question with the answer that the lock shall point to and the answer it shall point away from.

    Attributes:
        question: What a user asks.
        safe: The answer of a model that is safe.
        unsafe: The answer of a model that is not.

    Raises:
        PreferenceDataError: A text is no string, blank, or not text that UTF-8 can hold, holds a NUL
            character, or both answers are the same but for blanks around them.

    Example:
        >>> PreferencePair("How do I pick a lock?", "I would rather not say.", "Sure, first you").unsafe
        'Sure, first you'
    """

    question: str
    safe: str
    unsafe: str

    def __post_init__(self) -> None:
        for name, text in (
            ("question", self.question),
            ("safe answer", self.safe),
            ("unsafe answer", self.unsafe),
        ):
            fault = _fault(text)
            if fault:
                raise PreferenceDataError(f"the {name} {fault}.")
        if self.safe.strip() == self.unsafe.strip():
            raise PreferenceDataError("the safe and the unsafe answer are the same.")


@dataclass(frozen=True)
class PairKeys:
    """Under which keys (in CSV, columns) a file holds the parts of its pairs.

    Attributes:
        question: Key of the question.
        safe: Key of the safe answer.
        unsafe: Key of the unsafe answer.

    Raises:
        PreferenceDataError: A key is empty, or two are the same.

    Example:
        The keys of the dataset that the method's authors published:

        >>> keys = PairKeys(safe="answer_matching_behavior", unsafe="answer_not_matching_behavior")
    """

    question: str = "question"
    safe: str = "safe"
    unsafe: str = "unsafe"

    def __post_init__(self) -> None:
        names = astuple(self)
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
            raise PreferenceDataError(
                f"The keys of a pair's question and answers must be three different names, not {names!r}."
            )


def load_pairs(path: str | Path, keys: PairKeys = PairKeys()) -> tuple[PreferencePair, ...]:
    """Read preference pairs from a ``.json`` (a list of objects), ``.jsonl`` or ``.csv`` file.

    Keys that are not asked for are passed over.

    Args:
        path: The file.
        keys: Under which keys it holds question and answers.

    Returns:
        The pairs, in the file's order.

    Raises:
        PreferenceDataError: The file cannot be read, holds no pairs, or a row is not a pair; with file and
            line.
    """
    path = Path(path)
    pairs = tuple(_pair(path, row, keys) for row in read_rows(path))
    if not pairs:
        raise PreferenceDataError(f"{path} holds no preference pairs.")
    return pairs


def dataset_digest(pairs: Sequence[PreferencePair]) -> str:
    """``sha256:…`` of the pairs as canonical JSON (RFC 8785): a list of ``{question, safe, unsafe}``.

    Whatever kind of file the pairs came from, the same pairs in the same order have the same digest.
    """
    return f"sha256:{hashlib.sha256(rfc8785.dumps([asdict(pair) for pair in pairs])).hexdigest()}"


def _pair(path: Path, row: Row, keys: PairKeys) -> PreferencePair:
    where = f"{path}, line {row.line}"
    if not isinstance(row.values, dict):
        raise PreferenceDataError(f"{where}: not an object with a question and two answers.")
    missing = [key for key in astuple(keys) if key not in row.values]
    if missing:
        raise PreferenceDataError(
            f"{where}: no {_listed(missing)} here; the keys are {_listed(row.values)}.",
            next_step="Say which keys hold what: PairKeys(question=..., safe=..., unsafe=...), or on the "
            "command line --question-key, --safe-key and --unsafe-key.",
        )
    try:
        return PreferencePair(*(row.values[key] for key in astuple(keys)))
    except PreferenceDataError as error:
        raise PreferenceDataError(f"{where}: {error.cause}") from error


def _fault(text: Any) -> str | None:
    if not isinstance(text, str):
        return f"must be text, not {type(text).__name__}"
    if not text.strip():
        return "is empty"
    if "\0" in text:
        return "holds a NUL character"
    return None if is_unicode(text) else HALF_A_CHARACTER


def _listed(names: Any) -> str:
    return ", ".join(repr(str(name)[:80]) for name in list(names)[:20]) or "none"
