"""Lock files on disk: read within bounds, written all or nothing."""

from __future__ import annotations

import os
import resource
import socket
import stat
from pathlib import Path

import pytest

from mlflow_safelock.errors import LockError, LockFormatError
from mlflow_safelock.formats import load_lock, lock_from_bytes, save_lock
from tests.locks import make_lock


class TestFiles:
    def test_missing_file(self, tmp_path):
        with pytest.raises(LockFormatError, match=r"There is no file .*absent.*Check the path"):
            load_lock(tmp_path / "absent.safetensors")

    def test_directory(self, tmp_path):
        with pytest.raises(LockFormatError, match="is a directory"):
            load_lock(tmp_path)

    def test_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(LockFormatError, match="not a regular file"):
            load_lock(tmp_path / "pipe")

    def test_endless_device_is_not_read(self):
        with pytest.raises(LockFormatError, match="not a regular file"):
            load_lock("/dev/zero")

    def test_unreadable_file(self, tmp_path):
        save_lock(make_lock(), tmp_path / "a.safetensors")
        (tmp_path / "a.safetensors").chmod(0)
        user = os.geteuid()
        if user == 0:  # root may read everything
            os.seteuid(65534)
        try:
            with pytest.raises(LockFormatError, match="cannot be read: Permission denied"):
                load_lock(tmp_path / "a.safetensors")
        finally:
            os.seteuid(user)

    @pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
    def test_impossible_path(self, path):
        with pytest.raises(LockFormatError, match="cannot be read"):
            load_lock(path)
        with pytest.raises(LockError, match="cannot be written"):
            save_lock(make_lock(), path)

    def test_file_beyond_the_bound_is_not_read(self, tmp_path):
        with (tmp_path / "large.safetensors").open("wb") as file:
            file.truncate(1 << 40)  # sparse: it takes no space
        with pytest.raises(LockFormatError, match="more than 67108864 bytes"):
            load_lock(tmp_path / "large.safetensors")

    def test_bytes_beyond_the_bound_are_not_read(self):
        with pytest.raises(LockFormatError, match="at most 67108864"):
            lock_from_bytes(bytes((64 << 20) + 1))

    def test_saving_replaces_and_leaves_nothing_beside(self, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_bytes(b"old")
        save_lock(make_lock(), path)
        assert load_lock(path) == make_lock()
        assert list(tmp_path.iterdir()) == [path]

    def test_saved_file_has_ordinary_permissions(self, tmp_path):
        mask = os.umask(0o022)
        try:
            save_lock(make_lock(), tmp_path / "a.safetensors")
        finally:
            os.umask(mask)
        assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644

    def test_failed_write_leaves_the_old_file_and_nothing_beside(self, tmp_path):
        path = tmp_path / "a.safetensors"
        save_lock(make_lock(), path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as if the disk were full after 100 bytes
        try:
            with pytest.raises(LockError, match=r"cannot be written: File too large.*has space"):
                save_lock(make_lock(seed=7), path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert load_lock(path) == make_lock()
        assert list(tmp_path.iterdir()) == [path]

    def test_directory_in_the_way_is_left_alone(self, tmp_path):
        (tmp_path / "a.safetensors").mkdir()
        with pytest.raises(LockError, match="cannot be written"):
            save_lock(make_lock(), tmp_path / "a.safetensors")
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]

    @pytest.mark.parametrize("through", ["itself", "symlink"])
    def test_pipe_in_the_way_is_left_alone_and_not_waited_for(self, tmp_path, through):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        path = pipe if through == "itself" else tmp_path / "link"
        if through == "symlink":
            path.symlink_to(pipe)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(LockError, match=r"cannot be written: it is a pipe.*Give the path of a file"):
            save_lock(make_lock(), path)
        assert stat.S_ISFIFO(pipe.lstat().st_mode)
        assert sorted(tmp_path.iterdir()) == before

    def test_socket_in_the_way_is_left_alone(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # a socket's path may have 107 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
            with pytest.raises(LockError, match="it is a socket"):
                save_lock(make_lock(), "socket")
        assert stat.S_ISSOCK((tmp_path / "socket").lstat().st_mode)

    @pytest.mark.parametrize("existing", [True, False])
    def test_symlink_stays_and_what_it_leads_to_is_written(self, tmp_path, existing):
        (tmp_path / "folder").mkdir()
        file = tmp_path / "folder" / "a.safetensors"
        if existing:
            file.write_bytes(b"old")
        link = tmp_path / "link"
        link.symlink_to(Path("folder") / "a.safetensors")
        save_lock(make_lock(), link)
        assert link.is_symlink()
        assert not file.is_symlink()
        assert load_lock(file) == make_lock()
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.safetensors", "folder", "link"]

    def test_symlinks_in_a_circle_are_left_alone(self, tmp_path):
        (tmp_path / "a").symlink_to(tmp_path / "b")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        with pytest.raises(LockError, match="cannot be written"):
            save_lock(make_lock(), tmp_path / "a")
        assert all(path.is_symlink() for path in tmp_path.iterdir())

    def test_missing_folder_is_not_made(self, tmp_path):
        with pytest.raises(LockError, match="its folder exists"):
            save_lock(make_lock(), tmp_path / "no" / "a.safetensors")
        assert not (tmp_path / "no").exists()

    def test_lock_too_large_to_be_read_back_is_not_written(self, tmp_path):
        with pytest.raises(LockFormatError, match="Shorten its system prompt"):
            save_lock(make_lock(system_prompt="x" * (1 << 20)), tmp_path / "a.safetensors")
        assert list(tmp_path.iterdir()) == []
