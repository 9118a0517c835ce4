from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from mlflow_safelock.apply.checkpoint.folder import copy_file, written_aside
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


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_a_copy_has_the_bytes_and_is_independent(tmp_path, size):
    content = os.urandom(size)
    (tmp_path / "source").write_bytes(content)
    copy_file(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert (tmp_path / "copy").stat().st_ino != (tmp_path / "source").stat().st_ino


def test_a_copy_may_come_from_another_filesystem(tmp_path):
    # The kernel refuses to copy between some filesystems, and then the bytes go through this process.
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no second filesystem at /dev/shm")
    content = os.urandom(3_000_000)
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as elsewhere:
        elsewhere.write(content)
        elsewhere.flush()
        copy_file(Path(elsewhere.name), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


def test_a_copy_never_overwrites(tmp_path):
    (tmp_path / "source").write_text("new")
    (tmp_path / "copy").write_text("old")
    with pytest.raises(FileExistsError):
        copy_file(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "old"
