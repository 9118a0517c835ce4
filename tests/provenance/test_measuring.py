"""A full fingerprint misses no edit; a sampled one misses a few chosen bytes, and nothing else."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mlflow_safelock.errors import SourceError, VerificationError
from mlflow_safelock.provenance import (
    ArtifactFile,
    LocalArtifacts,
    SourceFingerprint,
    Span,
    check_every_byte,
    check_fingerprint,
    measure,
)
from mlflow_safelock.provenance.measuring import PIECE_BYTES, KeptOnDisk

FIRST, SECOND = "model/model-1.safetensors", "model/model-2.safetensors"
WEIGHTS = (FIRST, SECOND)
KINDS = ("flip", "truncate", "append", "swap files", "swap tensors", "train", "re-save", "add", "remove")
SMALL = ("MLmodel", "model/config.json")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two files of weights that are too large to be compared whole."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "model").mkdir()
    (folder / "MLmodel").write_text("flavors: {}\n")
    (folder / "model/config.json").write_text('{"model_type": "llama"}')
    generator = np.random.default_rng(0)
    for path in WEIGHTS:
        tensors = {f"layer.{i}": generator.normal(size=(256, 257)).astype(np.float32) for i in range(6)}
        save_file(tensors, folder / path)
        assert (folder / path).stat().st_size > 1 << 20
    return folder


@dataclass(frozen=True)
class Edit:
    """What somebody does to a model folder."""

    kind: str
    do: Callable[[Path], None]


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    kind = draw(st.sampled_from((*KINDS, "flip", "flip", "flip")))
    path = draw(st.sampled_from(WEIGHTS))
    where = draw(st.floats(0.0, 1.0, exclude_max=True))
    bits = draw(st.integers(1, 255))
    count = draw(st.integers(1, 8))

    def flip(folder: Path) -> None:
        data = bytearray((folder / path).read_bytes())
        start = int(where * (len(data) - count))
        data[start : start + count] = bytes(byte ^ bits for byte in data[start : start + count])
        (folder / path).write_bytes(data)

    def truncate(folder: Path) -> None:
        data = (folder / path).read_bytes()
        (folder / path).write_bytes(data[: int(where * len(data))])

    def append(folder: Path) -> None:
        (folder / path).write_bytes((folder / path).read_bytes() + bytes(count))

    def swap_files(folder: Path) -> None:
        first, second = ((folder / one).read_bytes() for one in WEIGHTS)
        (folder / FIRST).write_bytes(second)
        (folder / SECOND).write_bytes(first)

    def swap_tensors(folder: Path) -> None:
        tensors = load_file(folder / path)
        one, other = "layer.0", f"layer.{1 + bits % 5}"
        tensors[one], tensors[other] = tensors[other], tensors[one]
        save_file(tensors, folder / path)

    def train(folder: Path) -> None:
        tensors = load_file(folder / path)
        step = np.float32(10.0 ** -(1 + 3 * where))
        save_file({name: values + step for name, values in tensors.items()}, folder / path)

    def save_again(folder: Path) -> None:
        save_file(load_file(folder / path), folder / path, metadata={"format": "pt", "note": "x" * count})

    def add(folder: Path) -> None:
        (folder / "model" / "generation_config.json").write_bytes(bytes(count))

    def remove(folder: Path) -> None:
        (folder / draw_from((*WEIGHTS, *SMALL), where)).unlink()

    done = (flip, truncate, append, swap_files, swap_tensors, train, save_again, add, remove)
    return Edit(kind, dict(zip(KINDS, done, strict=True))[kind])


def draw_from(paths: Sequence[str], where: float) -> str:
    return paths[int(where * len(paths))]


def is_noticed(compare: Callable[..., None], fingerprint: SourceFingerprint, folder: Path) -> bool:
    try:
        compare(fingerprint, LocalArtifacts(folder))
    except (VerificationError, SourceError):
        return True
    return False


def test_of_many_edits_sampled_misses_only_a_few_bytes_and_full_misses_none(source: Path) -> None:
    fingerprint = measure(LocalArtifacts(source))
    done, missed = Counter[str](), Counter[str]()

    @settings(max_examples=300, derandomize=True, deadline=None, database=None)
    @given(edits())
    def edit_and_look(edit: Edit) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "copy"
            shutil.copytree(source, folder)
            assert not is_noticed(check_every_byte, fingerprint, folder)
            edit.do(folder)
            done[edit.kind] += 1
            assert is_noticed(check_every_byte, fingerprint, folder), edit.kind
            if not is_noticed(check_fingerprint, fingerprint, folder):
                missed[edit.kind] += 1

    edit_and_look()
    print(f"edits: {dict(done)}; missed by sampled: {dict(missed)}; missed by full: none")
    assert done.keys() == set(KINDS)
    assert missed.keys() == {"flip"}, "and some are missed, or this would show nothing"


def test_the_file_that_differs_is_named(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(source, folder)
    fingerprint = measure(LocalArtifacts(folder))
    unseen = byte_that_no_block_has(fingerprint, SECOND)
    flip_byte(folder / SECOND, unseen)
    check_fingerprint(fingerprint, LocalArtifacts(folder))
    with pytest.raises(VerificationError, match=r"model-2\.safetensors.*other bytes") as info:
        check_every_byte(fingerprint, LocalArtifacts(folder))
    assert "Register the changed model" in info.value.next_step


def byte_that_no_block_has(fingerprint: SourceFingerprint, path: str) -> int:
    """The place of a byte that a sampled comparison does not look at."""
    file = next(file for file in fingerprint.files if file.path == path)
    seen = {place for start, length in file.spans for place in (start - 1, *range(start, start + length))}
    return next(place for place in range(file.size - 1, 0, -1) if place not in seen)


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_the_digests_are_those_that_anybody_can_compute(source: Path) -> None:
    fingerprint = measure(LocalArtifacts(source))
    assert fingerprint.is_full
    assert {file.path: file.whole for file in fingerprint.files} == {
        path: sha256((source / path).read_bytes()).hexdigest() for path in (*SMALL, *WEIGHTS)
    }
    assert SourceFingerprint.model_validate_json(fingerprint.to_bytes()) == fingerprint


@dataclass
class Watched:
    """A folder that counts what is read of it, and fails when it was asked for too much."""

    folder: LocalArtifacts
    fails_after: int | None = None
    read_bytes: Counter[str] = field(default_factory=Counter)
    parallel_files: int = 1

    @property
    def location(self) -> str:
        return self.folder.location

    def files(self) -> tuple[ArtifactFile, ...]:
        return self.folder.files()

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        return self.folder.read(path, start, length)

    def read_many(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        self.read_bytes[path] += sum(length for _, length in spans)
        if self.fails_after is not None and self.read_bytes.total() > self.fails_after:
            raise SourceError("The store is gone.")
        return self.folder.read_many(path, spans)


class TestOneThatWasCutOff:
    @pytest.fixture
    def folder(self, source: Path, tmp_path: Path) -> Path:
        shutil.copytree(source, tmp_path / "copy")
        return tmp_path / "copy"

    @pytest.fixture
    def notes(self, folder: Path, tmp_path: Path) -> Path:
        """What a measuring left behind that failed in the second file of weights."""
        size = (folder / FIRST).stat().st_size
        reader = Watched(LocalArtifacts(folder), fails_after=int(1.5 * size))
        with pytest.raises(SourceError, match="gone"):
            measure(reader, KeptOnDisk(tmp_path / "cache" / "notes.jsonl"))
        return tmp_path / "cache" / "notes.jsonl"

    def test_goes_on_with_the_files_that_it_has_not_read(self, folder: Path, notes: Path) -> None:
        told: list[tuple[int, int]] = []
        reader = Watched(LocalArtifacts(folder))
        kept = KeptOnDisk(notes)
        measured = measure(reader, kept, lambda _what, done, total: told.append((done, total)))
        size = (folder / FIRST).stat().st_size
        assert reader.read_bytes[FIRST] < 0.1 * size, "blocks only"
        assert reader.read_bytes[SECOND] > size
        assert measured.is_of_the_same_bytes(measure(LocalArtifacts(folder)))
        assert told[0] == (0, measured.size)
        assert told[-1] == (measured.size, measured.size)
        kept.forget()
        assert not notes.exists()

    def test_reads_a_file_again_that_was_written_since(self, folder: Path, notes: Path) -> None:
        flip_byte(folder / FIRST, 700_000)
        measured = measure(LocalArtifacts(folder), KeptOnDisk(notes))
        assert measured.is_of_the_same_bytes(measure(LocalArtifacts(folder)))

    def test_is_not_confused_by_half_a_line(self, folder: Path, notes: Path) -> None:
        notes.write_bytes(notes.read_bytes()[:-9])
        measured = measure(LocalArtifacts(folder), KeptOnDisk(notes))
        assert measured.is_of_the_same_bytes(measure(LocalArtifacts(folder)))

    def test_starts_again_where_nothing_can_be_kept(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("no folder")
        kept = KeptOnDisk(tmp_path / "file" / "notes.jsonl")
        assert measure(LocalArtifacts(folder), kept).is_full


def test_a_source_that_changes_while_it_is_measured_is_an_error(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(source, folder)

    def edit(_what: str, done: int, _total: int) -> None:
        if done:
            (folder / "model/config.json").write_text('{"model_type": "gemma"}')

    with pytest.raises(VerificationError, match=r"config\.json"):
        measure(LocalArtifacts(folder), progress=edit)


def test_a_file_of_many_pieces_is_read_in_order(tmp_path: Path) -> None:
    data = np.random.default_rng(1).bytes(3 * PIECE_BYTES + 5)
    (tmp_path / "blob.bin").write_bytes(data)
    (file,) = measure(LocalArtifacts(tmp_path)).files
    assert file.whole == sha256(data).hexdigest()
