"""What was read once is what is read again, whatever becomes of the folder meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlflow_safelock.errors import SourceError
from mlflow_safelock.provenance import LocalArtifacts, SteadyArtifacts, contents_of


def test_what_was_read_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"a" * (3 << 20))
    (tmp_path / "small").write_bytes(b"a" * 100)
    before = LocalArtifacts(tmp_path)
    steady, expected = SteadyArtifacts(before), contents_of(before)
    assert steady.read("large", 10, 20) == b"a" * 20
    assert steady.read("small") == b"a" * 100
    whole = SteadyArtifacts(before)
    for file in whole.files():
        whole.read(file.path)
    (tmp_path / "large").write_bytes(b"b" * (3 << 20))
    (tmp_path / "small").write_bytes(b"b" * 200)
    (tmp_path / "new").write_bytes(b"")
    assert [file.path for file in steady.files()] == ["large", "small"]
    assert steady.read("large", 5, 30) == b"b" * 5 + b"a" * 20 + b"b" * 5
    assert steady.read_many("large", [(0, 12), (4, 2), (12, 2), (28, 10)]) == [
        b"b" * 10 + b"aa",
        b"bb",
        b"aa",
        b"aabbbbbbbb",
    ]
    assert steady.read("small") == b"a" * 100
    assert contents_of(steady, expected.seed) != expected, "of the large file only a part was read before"
    assert contents_of(whole, expected.seed) == expected
    with pytest.raises(SourceError, match="There is no file 'new'"):
        steady.read("new")
