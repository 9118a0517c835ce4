from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from mlflow_safelock.apply.checkpoint import sharing
from mlflow_safelock.apply.checkpoint.sharing import own_file, share_file, way_of
from mlflow_safelock.errors import CheckpointError

FICLONE = 0x40049409


@pytest.fixture
def reflinks(monkeypatch):
    """A filesystem with reflinks, as far as a process can tell: the kernel's own is simulated."""
    asked = []

    def ioctl(writer: int, request: int, reader: int) -> int:
        asked.append(request)
        os.write(writer, os.pread(reader, os.fstat(reader).st_size, 0))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return asked


@pytest.fixture
def no_reflinks(monkeypatch):
    def ioctl(*_: int) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


def file_of(tmp_path: Path, size: int = 3_000_000) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(size))
    return path


def test_a_filesystem_with_reflinks_is_asked_for_one(tmp_path, reflinks):
    source = file_of(tmp_path)
    assert share_file(source, tmp_path / "shared") == "reflink"
    assert own_file(source, tmp_path / "owned") == "reflink"
    assert reflinks == [FICLONE, FICLONE]
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "owned").read_bytes() == source.read_bytes()
    assert source.stat().st_nlink == 1


def test_without_reflinks_a_shared_file_is_a_hard_link(tmp_path, no_reflinks):
    source = file_of(tmp_path)
    assert share_file(source, tmp_path / "shared") == "hard link"
    assert (tmp_path / "shared").samefile(source)


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_a_file_of_one_s_own_has_the_bytes_and_is_independent(tmp_path, no_reflinks, size):
    source = file_of(tmp_path, size)
    assert own_file(source, tmp_path / "copy") == "copy"
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "copy").stat().st_ino != source.stat().st_ino


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "process"])
def test_a_copy_has_the_holes_of_its_file(tmp_path, no_reflinks, monkeypatch, kernel):
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")
    source, size = tmp_path / "source", 300 << 20
    with source.open("wb") as file:
        for place in (0, 100 << 20, size - 5):
            file.seek(place)
            file.write(b"bytes")
    if source.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("there are no holes on this filesystem")
    told: list[int] = []
    assert own_file(source, tmp_path / "copy", told.append) == "copy"
    assert sum(told) == size
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 20
    with (tmp_path / "copy").open("rb") as copy:
        for place in (0, 100 << 20, size - 5):
            copy.seek(place)
            assert copy.read(5) == b"bytes"
        copy.seek(50 << 20)
        assert copy.read(100) == bytes(100)


def test_a_file_that_becomes_shorter_while_it_is_copied_is_no_copy(tmp_path, no_reflinks, monkeypatch):
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.write(b"x" * (1 << 20))
        file.truncate(4 << 20)
    copied = sharing._copied_some

    def and_then_it_shrinks(*arguments):
        count = copied(*arguments)
        os.truncate(source, 1 << 20)
        return count

    monkeypatch.setattr(sharing, "_copied_some", and_then_it_shrinks)
    with pytest.raises(OSError, match="shorter"):
        own_file(source, tmp_path / "copy")


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_nothing_can_be_shared_it_is_copied(tmp_path, no_reflinks, monkeypatch, code):
    def link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    source = file_of(tmp_path)
    assert share_file(source, tmp_path / "copy") == "copy"
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_a_file_may_come_from_another_filesystem(tmp_path):
    if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second filesystem at /dev/shm")
    content = os.urandom(3_000_000)
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as elsewhere:
        elsewhere.write(content)
        elsewhere.flush()
        assert share_file(Path(elsewhere.name), tmp_path / "copy") == "copy"
    assert (tmp_path / "copy").read_bytes() == content


def test_a_kernel_that_cannot_copy_between_two_files_is_done_without(tmp_path, no_reflinks, monkeypatch):
    def refuse(*_: int) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    source = file_of(tmp_path)
    own_file(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("way", [share_file, own_file])
def test_a_symbolic_link_stands_for_its_file(tmp_path, way):
    source = file_of(tmp_path)
    (tmp_path / "link").symlink_to(source.name)
    way(tmp_path / "link", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("way", [share_file, own_file])
def test_nothing_is_ever_written_over(tmp_path, way):
    source = file_of(tmp_path)
    (tmp_path / "there").write_text("old")
    with pytest.raises(FileExistsError):
        way(source, tmp_path / "there")
    assert (tmp_path / "there").read_text() == "old"


@pytest.mark.parametrize("call", ["ioctl", "link", "copy_file_range"])
def test_a_disk_that_is_full_is_not_taken_for_one_that_cannot_share(tmp_path, no_reflinks, monkeypatch, call):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fcntl if call == "ioctl" else os, call, full)
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: pytest.fail("it went on"))
    with pytest.raises(OSError, match="No space"):
        (own_file if call == "copy_file_range" else share_file)(file_of(tmp_path), tmp_path / "new")


def test_a_way_that_there_is_not_is_refused_with_those_there_are():
    with pytest.raises(CheckpointError, match=r"sharing is 'symlink'.*link, copy"):
        way_of("symlink")
