"""The zip around a published pickle: exactly torch's, within bounds, or refused."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_safelock.errors import LockFormatError
from mlflow_safelock.formats.torch_archive import MAX_ARCHIVE_BYTES, read_pickle_bytes
from tests.formats.published_files import write_archive

ENTRIES = {
    "x/data.pkl": b"\x80\x02N.",
    "x/byteorder": b"little",
    "x/version": b"3\n",
    "x/.data/serialization_id": b"0636457737946401051300000011240841767826",
}


def zipped(entries: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore", UserWarning)  # zipfile warns of names that are there twice
        for name, data in entries.items() if isinstance(entries, dict) else entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def refused(data: bytes, match: str) -> None:
    with pytest.raises(LockFormatError, match=match) as caught:
        read_pickle_bytes(data, "y.safelock")
    assert "y.safelock" in str(caught.value)


def test_pickle_comes_out_unopened(tmp_path):
    path = write_archive(tmp_path / "a", b"not even a pickle")
    assert read_pickle_bytes(path.read_bytes(), "a") == b"not even a pickle"
    assert read_pickle_bytes(zipped(ENTRIES), "a") == ENTRIES["x/data.pkl"]


@pytest.mark.parametrize("absent", ["x/byteorder", "x/version", "x/.data/serialization_id"])
def test_older_archives_have_fewer_entries(absent):
    entries = {name: data for name, data in ENTRIES.items() if name != absent}
    assert read_pickle_bytes(zipped(entries), "a") == ENTRIES["x/data.pkl"]


@pytest.mark.parametrize(
    "name",
    [
        "x/data/0",
        "x/code/__torch__.py",
        "x/constants.pkl",
        "x/data.pkl.py",
        "data.pkl",
        "x/../data.pkl",
        "x/",
        "/y",
    ],
)
def test_any_other_entry_is_refused(name):
    refused(zipped(ENTRIES | {name: b"1"}), "which no published lock does")


def test_storage_beside_the_pickle_is_refused(tmp_path):
    path = write_archive(tmp_path / "a", b"\x80\x02N.", {"data/0": bytes(64)})
    refused(path.read_bytes(), "data/0")


@pytest.mark.parametrize("name", ENTRIES)
def test_entry_twice_is_refused(name):
    refused(zipped([*ENTRIES.items(), (name, b"other")]), "twice")


def test_two_folders_are_refused():
    refused(zipped({"x/data.pkl": b"", "y/version": b"3\n"}), "not one that torch.save wrote")


@pytest.mark.parametrize("entries", [{"x/version": b"3\n"}, {"readme.txt": b"hello"}])
def test_other_archives_are_refused(entries):
    refused(zipped(entries), "lacks data.pkl|which no published lock does")


def test_archive_without_entries_is_refused():
    refused(zipped({}), "an empty zip archive")


@pytest.mark.parametrize(
    ("name", "content"), [("x/byteorder", b"big"), ("x/version", b"2\n"), ("x/byteorder", b"")]
)
def test_other_byte_order_or_version_is_refused(name, content):
    refused(zipped(ENTRIES | {name: content}), f"{name[2:]}' in y.safelock says")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_entries_are_refused_before_they_grow(method):
    data = zipped(ENTRIES | {"x/data.pkl": bytes(64 << 20)}, method)
    assert len(data) < MAX_ARCHIVE_BYTES
    tracemalloc.start()
    try:
        refused(data, "is compressed")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_archive_beyond_the_bound_is_refused():
    refused(zipped(ENTRIES | {"x/data.pkl": bytes(MAX_ARCHIVE_BYTES)}), "at most 1048576")


def central_record(data: bytes, name: str) -> int:
    """Where the central directory describes an entry."""
    return data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))


def test_encrypted_entry_is_refused():
    data = bytearray(zipped(ENTRIES))
    data[central_record(bytes(data), "x/data.pkl") + 8] |= 1
    refused(bytes(data), "is encrypted")


def test_entry_that_claims_more_than_there_is_is_refused():
    data = bytearray(zipped(ENTRIES))
    record = central_record(bytes(data), "x/data.pkl")
    struct.pack_into("<II", data, record + 20, 1 << 30, 1 << 30)
    refused(bytes(data), "claims 1073741824 bytes")
    struct.pack_into("<II", data, record + 20, 1 << 16, 1 << 16)
    refused(bytes(data), "damaged|cut short")


def test_method_that_zipfile_does_not_know_is_refused():
    data = bytearray(zipped(ENTRIES))
    struct.pack_into("<H", data, central_record(bytes(data), "x/data.pkl") + 10, 99)
    refused(bytes(data), "is compressed")


def test_wrong_checksum_is_refused():
    data = zipped(ENTRIES)
    refused(data.replace(b"\x80\x02N.", b"\x80\x02K.", 1), "damaged")


def test_data_before_the_archive_is_refused():
    refused(b"#!/bin/sh\n" + zipped(ENTRIES), "of no kind known here")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "an empty file"),
        (b"\x80\x02N.", "a pickle"),
        (b"<html>", "a web page"),
        (b"abc", "no kind known"),
    ],
)
def test_other_files_are_called_what_they_are(data, kind):
    refused(data, kind)


def test_an_archive_cut_anywhere_is_refused():
    data = zipped(ENTRIES)
    for end in range(len(data)):
        refused(data[:end], r"y\.safelock")


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(zipped(ENTRIES)) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_changes_nothing(position, flip):
    data = bytearray(zipped(ENTRIES))
    data[position] ^= flip
    try:
        content = read_pickle_bytes(bytes(data), "a")
    except LockFormatError:
        return
    assert content == ENTRIES["x/data.pkl"]


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_noise_with_a_zip_signature_is_refused(noise):
    refused(b"PK\x03\x04" + noise, r"y\.safelock")
