"""Other files are called what they are."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from mlflow_safelock.errors import LockFormatError
from mlflow_safelock.formats import load_lock, lock_from_bytes, lock_to_bytes
from mlflow_safelock.lock import SafetyLock
from tests.locks import heads, metadata


class TestOtherFiles:
    @staticmethod
    def named_as_a_lock(tmp_path: Path, data: bytes) -> Path:
        path = tmp_path / "lock.safetensors"
        path.write_bytes(data)
        return path

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickle_by_another_name_is_called_one_and_not_run(self, tmp_path, protocol):
        marker = tmp_path / "it ran"
        path = self.named_as_a_lock(tmp_path, pickle.dumps(MakesFolder(marker), protocol))
        with pytest.raises(LockFormatError, match="is a pickle, which could run code"):
            load_lock(path)
        assert not marker.exists()
        pickle.loads(path.read_bytes())
        assert marker.exists(), "the pickle was harmless, so the test showed nothing"

    def test_torch_archive_by_another_name_is_called_one(self, tmp_path):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", b"")
        path = self.named_as_a_lock(tmp_path, buffer.getvalue())
        with pytest.raises(
            LockFormatError, match=r"zip archive, such as torch.save writes.*safelock lock import"
        ):
            load_lock(path)

    @pytest.mark.parametrize(
        ("data", "kind"),
        [
            (b"", "an empty file"),
            (gzip.compress(b"x" * 100, mtime=0), "a gzip file"),
            (b"\x93NUMPY\x01\x00v\x00{'descr'", "a NumPy array"),
            (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file"),
            (b"GGUF\x03\0\0\0" + bytes(20), "a GGUF model"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "never downloaded"),
            (b"<!DOCTYPE html><html></html>", "a web page"),
            (b'{"format": "mlflow-safelock"}', "JSON text"),
            (b"\x7fELF\x02\x01\x01" + bytes(20), "an executable"),
        ],
    )
    def test_other_files_are_called_what_they_are(self, tmp_path, data, kind):
        path = self.named_as_a_lock(tmp_path, data)
        with pytest.raises(LockFormatError, match=kind) as caught:
            load_lock(path)
        assert str(path) in str(caught.value)

    def test_unknown_content_is_refused_too(self):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w"):
            pass
        with pytest.raises(LockFormatError):
            lock_from_bytes(buffer.getvalue())

    def test_safetensors_of_a_model_is_no_lock(self):
        tensors = {"lm_head.weight": np.zeros((2, 2), dtype=np.float32)}
        with pytest.raises(LockFormatError, match="without metadata, so it is not a lock"):
            lock_from_bytes(safetensors.numpy.save(tensors))
        with pytest.raises(LockFormatError, match="format 'pt'"):
            lock_from_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))

    def test_sound_file_whose_header_length_looks_like_a_pickle_is_read(self):
        # 640 is 0x0280: such a file begins with the bytes of a pickle of protocol 2.
        for padding in range(400):
            lock = SafetyLock(
                heads(), metadata(system_prompt=None, tools=None, base_model="m" * (padding + 1))
            )
            data = lock_to_bytes(lock)
            if 0x80 in data[:1] and data[1:2] in b"\x02\x03\x04\x05":
                assert lock_from_bytes(data) == lock
                return
        pytest.fail("no lock had such a header length")


class MakesFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
