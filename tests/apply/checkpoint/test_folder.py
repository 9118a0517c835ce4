from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mlflow_safelock.apply.checkpoint.folder import written_aside
from mlflow_safelock.errors import CheckpointError


def test_the_folder_appears_when_the_block_is_done_and_not_before(tmp_path):
    with written_aside(tmp_path / "made") as beside:
        (beside / "file").write_text("x")
        assert not (tmp_path / "made").exists()
        assert beside.parent == tmp_path
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "file"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_nothing_is_left_when_the_block_fails(tmp_path, error):
    def fail(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        raise error

    with pytest.raises(type(error)), written_aside(tmp_path / "made") as beside:
        fail(beside)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_disk_becomes_one_of_ours(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(CheckpointError, match=r"written: .*No space"), written_aside(tmp_path / "made"):
        raise full
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_in_the_meantime_is_left_alone(tmp_path):
    precious = tmp_path / "made" / "precious"
    with pytest.raises(CheckpointError, match="exists already"), written_aside(tmp_path / "made"):
        os.renames(_file(tmp_path / "somebody's"), precious)
    assert list(tmp_path.iterdir()) == [tmp_path / "made"]
    assert precious.read_text() == "x"


def _file(path: Path) -> Path:
    path.write_text("x")
    return path


def test_everything_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def noted(descriptor: int) -> None:
        flushed.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), made.exists()))
        fsync(descriptor)

    made = tmp_path / "made"
    monkeypatch.setattr(os, "fsync", noted)
    with written_aside(made) as beside:
        (beside / "sub").mkdir()
        (beside / "sub" / "file").write_text("x")
    assert {("file", False), ("sub", False), (beside.name, False)} <= set(flushed)
    assert flushed[-1] == (tmp_path.name, True)


def test_a_disk_that_loses_what_was_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="Input/output"), written_aside(tmp_path / "made") as beside:
        (beside / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_as_many_bytes_as_a_name_may_have_is_taken(tmp_path):
    folder = tmp_path / ("\N{LOCK}" * 60)
    with written_aside(folder) as beside:
        (beside / "file").write_text("here")
    assert (folder / "file").read_text() == "here"
