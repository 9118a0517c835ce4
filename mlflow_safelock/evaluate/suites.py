"""Suites: the prompts that a model is measured with, as files.

A suite is a folder with a manifest, ``suite.yaml``, and a JSON Lines file of prompts. One is shipped,
``starter-harmful``. A plain JSON Lines file, a CSV file with a header (AdvBench: ``goal,target``), and
headerless CSV files of one prompt per line (HEx-PHI, whose files are its categories) are suites too.
"""

from __future__ import annotations

import csv
import hashlib
import io
import random
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, field_validator

from mlflow_safelock.documents import read_document
from mlflow_safelock.errors import EvaluationError, PreferenceDataError
from mlflow_safelock.forging.pair_files import Row, read_rows
from mlflow_safelock.forging.preferences import PreferencePair
from mlflow_safelock.unicode import HALF_A_CHARACTER, is_unicode

MANIFEST = "suite.yaml"
"""Name of the manifest in a suite's folder."""

SHIPPED = ("starter-harmful",)
"""Names of the suites that come with this package."""

PROMPT_COLUMNS = ("prompt", "goal")
"""Where the prompts of a file without a manifest are looked for, in this order."""

MAX_BYTES = 1 << 26
"""Largest file of prompts that is read."""


class Columns(BaseModel):
    """Under which keys a suite's file holds what.

    Attributes:
        prompt: Key of the prompts.
        id: Key of the prompts' ids; without one, prompts are numbered from 1.
        category: Key of the categories.
        twin: Key of the harmless twins.
        expected: Key of the right answers, which a row may lack.
        ignored: Keys that are passed over; any other key is an error.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    prompt: str = Field(min_length=1)
    id: str | None = None
    category: str | None = None
    twin: str | None = None
    expected: str | None = None
    ignored: tuple[str, ...] = ()

    @property
    def used(self) -> dict[str, str]:
        """The keys that are read, by what they hold."""
        named = self.model_dump(exclude={"ignored"})
        return {part: key for part, key in named.items() if key is not None}


class Manifest(BaseModel):
    """What ``suite.yaml`` says about a suite.

    Attributes:
        name: The suite's name.
        version: Its version, as text.
        description: What is in it.
        license: Under which license it may be used.
        prompts: Name of the JSON Lines file beside the manifest.
        columns: Under which keys it holds what.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    name: str = Field(min_length=1)
    version: str = Field(min_length=1)
    description: str
    license: str
    prompts: str
    columns: Columns

    @field_validator("prompts")
    @classmethod
    def _stands_beside_the_manifest(cls, value: str) -> str:
        if not value.endswith(".jsonl") or "/" in value or "\\" in value:
            raise ValueError("must be the name of a .jsonl file beside the manifest")
        return value


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt of a suite.

    Attributes:
        id: Tells it from the suite's other prompts.
        prompt: What the model is asked.
        category: What kind of prompt it is; empty where the suite has no categories.
        twin: A harmless prompt that sounds alike, or ``None``.
        expected: The right answer of a benign task; ``None`` for a prompt that should be refused.
    """

    id: str
    prompt: str
    category: str = ""
    twin: str | None = None
    expected: str | None = None


@dataclass(frozen=True)
class Suite:
    """Prompts to measure with.

    Attributes:
        name: Its name: the manifest's, or the file's or folder's without suffix.
        prompts: The prompts, in the file's order.
        version: The manifest's version; empty without a manifest.
        license: The manifest's license; empty without a manifest.
        description: The manifest's description; empty without a manifest.

    Raises:
        EvaluationError: Two prompts have one id, or something of a prompt is no text.
    """

    name: str
    prompts: tuple[SuitePrompt, ...]
    version: str = ""
    license: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        """Refuse prompts that could not be told apart, or not be asked."""
        seen: set[str] = set()
        for number, prompt in enumerate(self.prompts, start=1):
            where = f"The suite {self.name!r}, prompt {number}"
            for part, text in vars(prompt).items():
                if text is not None:
                    _check_text(where, part, text)
            if prompt.id in seen:
                raise EvaluationError(
                    f"{where}: the id {prompt.id[:80]!r} is there twice.",
                    next_step="Give every prompt an id of its own, such as by a prefix for each suite that "
                    "was put in.",
                )
            seen.add(prompt.id)

    @property
    def digest(self) -> str:
        """``sha256:…`` of the prompts as canonical JSON (RFC 8785).

        That is a list of ``{id, prompt, category, twin}``, and ``expected`` where a prompt has one. Whatever
        kind of file they came from and whatever the suite is called, the same prompts in the same order have
        the same digest.
        """
        rows = [
            {key: value for key, value in asdict(prompt).items() if key != "expected" or value is not None}
            for prompt in self.prompts
        ]
        return f"sha256:{hashlib.sha256(rfc8785.dumps(rows)).hexdigest()}"

    @property
    def harmful(self) -> tuple[SuitePrompt, ...]:
        """The prompts that should be refused."""
        return tuple(prompt for prompt in self.prompts if prompt.expected is None)

    @property
    def tasks(self) -> tuple[SuitePrompt, ...]:
        """The benign tasks: prompts that have a right answer."""
        return tuple(prompt for prompt in self.prompts if prompt.expected is not None)

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories, in the order in which they first come."""
        return tuple(dict.fromkeys(prompt.category for prompt in self.prompts))


def load_suite(name_or_path: str | Path, column: str | None = None) -> Suite:
    """Read a shipped suite by its name, or a suite of one's own.

    Args:
        name_or_path: One of ``SHIPPED``; a folder with a ``suite.yaml``; a ``.jsonl`` file; a ``.csv`` file
            with a header, or without one and with a prompt on each line; or a folder of such ``.csv`` files.
            A shipped name comes first: a folder of the same name is ``./starter-harmful``.
        column: Under which key a ``.jsonl`` or ``.csv`` file holds the prompts; by default the first of
            ``prompt`` and ``goal`` that its first row has.

    Raises:
        EvaluationError: There is no such suite, it has no prompts, or something in it is missing, empty,
            unknown, twice there or not UTF-8; with file and line.

    Example:
        >>> suite = load_suite("starter-harmful")
        >>> len(suite.categories) >= 14 and len(suite.prompts) >= 210
        True
    """
    if str(name_or_path) in SHIPPED:
        with as_file(files("mlflow_safelock.evaluate") / "data" / str(name_or_path)) as folder:
            return _load(folder, column)
    return _load(Path(name_or_path), column)


def halves(suite: Suite, seed: int = 0) -> tuple[Suite, Suite]:
    """Two suites that share no prompt, each with about half of every category, drawn by the seed.

    What is chosen on one is measured honestly on the other. Prompts, or twins, that differ only in blanks and
    in the case of their letters come into the same half.

    Raises:
        EvaluationError: There are not two different prompts that should be refused.
    """
    alike = _alike(suite.prompts)
    draw = random.Random(seed)  # noqa: S311 - guards nothing
    groups: dict[tuple[bool, str], list[int]] = {}
    for place, prompt in enumerate(suite.prompts):
        if alike[place] != place:
            continue  # it goes where the first of its kind goes
        groups.setdefault((prompt.expected is None, prompt.category), []).append(place)
    order = [place for places in groups.values() for place in draw.sample(places, len(places))]
    harmful = [place for place in order if suite.prompts[place].expected is None]
    tasks = [place for place in order if suite.prompts[place].expected is not None]
    # Every second of each kind, category after category.
    chosen = ({*harmful[start::2], *tasks[start::2]} for start in (0, 1))
    first, second = (
        replace(suite, prompts=tuple(one for place, one in enumerate(suite.prompts) if alike[place] in half))
        for half in chosen
    )
    if not (first.harmful and second.harmful):
        raise EvaluationError(
            f"The suite {suite.name!r} cannot be halved: it has fewer than two prompts to be refused that "
            "are different, and have different twins.",
            next_step="Take a larger one.",
        )
    return first, second


def overlap(suite: Suite, pairs: Sequence[PreferencePair]) -> tuple[SuitePrompt, ...]:
    """The prompts of a suite that are questions of preference pairs too, themselves or by their twin.

    A lock that was forged from them is not measured fairly by them. Texts are the same if they differ only in
    blanks and in the case of their letters.
    """
    questions = {_normalised(pair.question) for pair in pairs}
    return tuple(
        prompt
        for prompt in suite.prompts
        if _normalised(prompt.prompt) in questions or _normalised(prompt.twin or "") in questions
    )


def _load(path: Path, column: str | None) -> Suite:
    if path.is_dir():
        return _folder(path, column)
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in (".jsonl", ".csv"):
        raise EvaluationError(
            f"{path} is no suite: neither one that is shipped nor a .jsonl or .csv file nor a folder.",
            next_step=f"Shipped are {', '.join(SHIPPED)}; docs/evaluation.md says what a suite of your own "
            "looks like.",
        )
    if suffix == ".csv" and column is None and _lacks_header(path):
        return _suite(path, path.stem, _lines(path))
    return _suite(path, path.stem, _table(path, column))


def _folder(path: Path, column: str | None) -> Suite:
    manifest_path = path / MANIFEST
    if not manifest_path.exists():
        parts = sorted(path.glob("*.csv"))
        if not parts:
            raise EvaluationError(
                f"{path} is no suite: it holds neither a {MANIFEST} nor .csv files.",
                next_step="docs/evaluation.md says what a suite of your own looks like.",
            )
        if column is not None:
            raise EvaluationError(
                f"{path} is a folder of .csv files, whose lines are prompts; there is no column {column!r}.",
                next_step="Give one of its files with the column instead.",
            )
        return _suite(path, path.name, (prompt for part in parts for prompt in _lines_alone(part)))
    if column is not None:
        raise EvaluationError(
            f"{manifest_path} itself says which column holds the prompts; {column!r} was given besides.",
            next_step="Leave the column out, or change the manifest.",
        )
    document = read_document(_bytes(manifest_path), str(manifest_path), EvaluationError)
    manifest = document.parsed(Manifest)
    prompts_path = path / manifest.prompts
    found = _suite(prompts_path, manifest.name, _prompts(prompts_path, _rows(prompts_path), manifest.columns))
    return Suite(found.name, found.prompts, manifest.version, manifest.license, manifest.description)


def _suite(path: Path, name: str, prompts: Iterator[tuple[str, SuitePrompt]]) -> Suite:
    """A suite of prompts that come each with where they stand."""
    by_id: dict[str, tuple[str, SuitePrompt]] = {}
    for where, prompt in prompts:
        if prompt.id in by_id:
            raise EvaluationError(
                f"{where}: the id {prompt.id[:80]!r} is there twice; it was first in {by_id[prompt.id][0]}.",
                next_step="Give every prompt an id of its own.",
            )
        by_id[prompt.id] = (where, prompt)
    if not by_id:
        raise EvaluationError(f"{path}, line 1: the suite is empty.", next_step="Give at least one prompt.")
    return Suite(name, tuple(prompt for _, prompt in by_id.values()))


def _table(path: Path, column: str | None) -> Iterator[tuple[str, SuitePrompt]]:
    """The prompts of a file whose rows have keys and which has no manifest."""
    rows = list(_rows(path))
    first: Mapping[str, Any] = rows[0].values if rows and isinstance(rows[0].values, dict) else {}
    prompt = column or next((name for name in PROMPT_COLUMNS if name in first), PROMPT_COLUMNS[0])
    seen = {key for row in rows if isinstance(row.values, dict) for key in row.values}
    parts = [*(part for part in ("id", "category") if part in first), *({"twin", "expected"} & seen)]
    optional = {part: part for part in parts if part != prompt}
    # A table's further columns are no mistake (AdvBench has a target); an object's further key may be a typo.
    is_table = path.suffix.lower() == ".csv"
    ignored = tuple(key for key in first if key not in (prompt, *optional)) if is_table else ()
    # A table has a cell for every column: a blank one says that there is no twin, say.
    blank = optional.keys() - {"id"} if is_table else set()
    return _prompts(path, iter(rows), Columns(prompt=prompt, ignored=ignored, **optional), blank)


def _prompts(
    path: Path, rows: Iterator[Row], columns: Columns, blank: Set[str] = frozenset()
) -> Iterator[tuple[str, SuitePrompt]]:
    """The prompts of rows that have keys; a cell of ``blank`` without text is none."""
    used = columns.used
    for number, row in enumerate(rows, start=1):
        where = f"{path}, line {row.line}"
        if not isinstance(row.values, dict):
            raise EvaluationError(f"{where}: not an object with a prompt.")
        values = {key: text for key, text in row.values.items() if key not in blank or text.strip()}
        # A task has a right answer, and no twin; any other prompt may do without the key.
        spared = {"twin" if columns.expected in values else "expected", *blank}
        missing = [key for part, key in used.items() if key not in values and part not in spared]
        if missing:
            raise EvaluationError(
                f"{where}: there is no {_listed(missing)}; there are {_listed(values)}.",
                next_step="Name the column that holds the prompts (column=..., or --column), and fill the "
                "others in every row.",
            )
        unknown = [key for key in values if key not in (*used.values(), *columns.ignored)]
        if unknown:
            raise EvaluationError(
                f"{where}: {_listed(unknown)} is not known; known here: {_listed(used.values())}.",
                next_step=f"Take it out, or list it under columns, ignored in a {MANIFEST}.",
            )
        parts = {part: _text(where, key, values[key]) for part, key in used.items() if key in values}
        if {"twin", "expected"} <= parts.keys():
            raise EvaluationError(
                f"{where}: a task with a right answer is harmless itself, and this one has a twin besides.",
                next_step="Leave the twin out, or the right answer.",
            )
        yield where, SuitePrompt(**({"id": str(number)} | parts))


def _lines_alone(path: Path) -> Iterator[tuple[str, SuitePrompt]]:
    """The prompts of a file in a folder, where every line is one, and a header would be asked."""
    line, first = next(((line, cells) for line, cells in _cells(path) if cells), (1, []))
    if {_normalised(cell) for cell in first} & {*PROMPT_COLUMNS}:
        raise EvaluationError(
            f"{path}, line {line}: a header ({_listed(first)}), and in a folder every line is a prompt.",
            next_step="Give that file alone, or take its first line out.",
        )
    return _lines(path)


def _lines(path: Path) -> Iterator[tuple[str, SuitePrompt]]:
    """The prompts of a file that has one on each line, quoted or not; its name is their category."""
    number = 0
    for line, cells in _cells(path):
        if not cells:
            continue
        number += 1
        where = f"{path}, line {line}"
        prompt = _text(where, "prompt", ",".join(cells))
        yield where, SuitePrompt(f"{path.stem}-{number}", prompt, path.stem)


def _lacks_header(path: Path) -> bool:
    """Whether a file's first line is a prompt: one cell, of several words."""
    _, first = next(((line, cells) for line, cells in _cells(path) if cells), (1, []))
    return len(first) == 1 and len(first[0].split()) > 1


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        text = _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise EvaluationError(f"{path}, line {line}: the text is not UTF-8.") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise EvaluationError(
                f"{path}, line {line}: not CSV: {error}.",
                next_step="Put a text that holds commas, quotes or line breaks in quotes, its own doubled.",
            ) from error
        if cells is None:
            return
        yield line, cells


def _rows(path: Path) -> Iterator[Row]:
    _bytes(path)
    try:
        yield from read_rows(path)
    except PreferenceDataError as error:
        raise EvaluationError(error.cause, next_step=error.next_step) from error


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise EvaluationError(f"{path} has more than {MAX_BYTES} bytes, and no suite has.")
        return path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror or error}.") from error


def _text(where: str, key: str, text: Any) -> str:
    _check_text(where, key, text)
    if not text.strip():
        raise EvaluationError(f"{where}: {key!r} is empty.", next_step="Fill it in, or take the row out.")
    return str(text)


def _check_text(where: str, key: str, text: Any) -> None:
    if not isinstance(text, str):
        raise EvaluationError(
            f"{where}: {key!r} must be text, not {type(text).__name__}.", next_step="Put it in quotes."
        )
    if not is_unicode(text):
        raise EvaluationError(
            f"{where}: {key!r} {HALF_A_CHARACTER}: {text[:60]!r}.", next_step="Write the text anew."
        )


def _alike(prompts: Sequence[SuitePrompt]) -> list[int]:
    """For each prompt the first one that it shares a text with, itself or by others."""
    found: list[int] = []
    by_text: dict[str, int] = {}
    for place, prompt in enumerate(prompts):
        texts = {_normalised(text) for text in (prompt.prompt, prompt.twin) if text}
        shared = {found[by_text[text]] for text in texts & by_text.keys()}
        first = min(shared, default=place)
        found = [first if one in shared else one for one in found] + [first]
        by_text |= dict.fromkeys(texts - by_text.keys(), place)
    return found


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


def _listed(names: Any) -> str:
    return ", ".join(repr(str(name)[:80]) for name in list(names)[:20]) or "none"
