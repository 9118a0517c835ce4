"""The sampled fingerprint notices what it says it notices."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import rfc8785
from hypothesis import given
from safetensors.numpy import load_file, save_file

from mlflow_safelock.errors import SourceError, VerificationError
from mlflow_safelock.provenance import (
    FileFingerprint,
    LocalArtifacts,
    SourceFingerprint,
    StoreChecksum,
    check_fingerprint,
    read_header,
    take_fingerprint,
)
from mlflow_safelock.provenance.weights import USUAL_HEADER_BYTES

WEIGHTS = "model/model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "model").mkdir(parents=True)
    (folder / "MLmodel").write_text("flavors: {}\n")
    (folder / "model/config.json").write_text('{"model_type": "llama"}')
    generator = np.random.default_rng(0)
    tensors = {f"layer.{i}": generator.normal(size=(256, 257)).astype(np.float32) for i in range(6)}
    save_file(tensors, folder / WEIGHTS)
    assert (folder / WEIGHTS).stat().st_size > 1 << 20, "large enough to be sampled"
    return folder


def retrain(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: values + np.float32(1e-3) for name, values in tensors.items()}, folder / WEIGHTS)


def retrain_one_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["layer.3"] = tensors["layer.3"] * np.float32(1.01)
    save_file(tensors, folder / WEIGHTS)


def rename_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["layer.x"] = tensors.pop("layer.5")
    save_file(tensors, folder / WEIGHTS)


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1])


def edit_the_configuration(folder: Path) -> None:
    (folder / "model/config.json").write_text('{"model_type": "gemma"}')


def add_an_adapter(folder: Path) -> None:
    (folder / "model/adapter_config.json").write_text("{}")


def remove_a_file(folder: Path) -> None:
    (folder / "MLmodel").unlink()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (retrain, WEIGHTS),
        (retrain_one_tensor, WEIGHTS),
        (rename_a_tensor, WEIGHTS),
        (truncate, WEIGHTS),
        (edit_the_configuration, "model/config.json"),
        (add_an_adapter, "model/adapter_config.json"),
        (remove_a_file, "MLmodel"),
    ],
)
def test_a_changed_source_is_refused_and_the_file_named(
    source: Path, change: Callable[[Path], None], named: str
) -> None:
    fingerprint = take_fingerprint(LocalArtifacts(source))
    change(source)
    with pytest.raises(VerificationError, match=named):
        check_fingerprint(fingerprint, LocalArtifacts(source))


def test_an_exact_copy_has_the_fingerprint_with_what_mlflow_adds_to_a_download(
    source: Path, tmp_path: Path
) -> None:
    fingerprint = take_fingerprint(LocalArtifacts(source))
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "registered_model_meta").write_text("model_name: bot\n")
    check_fingerprint(fingerprint, LocalArtifacts(copy))


def test_the_blocks_that_are_compared_are_drawn_anew_each_time(source: Path) -> None:
    first, second = (take_fingerprint(LocalArtifacts(source)) for _ in range(2))
    assert first != second
    spans = {file.path: file.spans for file in first.files}[WEIGHTS]
    assert len(spans) == 1 + 6, "the header, and one block in each tensor"


def test_only_a_small_part_of_large_weights_is_read(source: Path) -> None:
    fingerprint = take_fingerprint(LocalArtifacts(source))
    file = next(file for file in fingerprint.files if file.path == WEIGHTS)
    assert sum(length for _, length in file.spans) < 0.03 * file.size


def test_a_large_file_of_another_kind_is_sampled_evenly(source: Path) -> None:
    blob = source / "extra.bin"
    blob.write_bytes(bytes(3 << 20))
    fingerprint = take_fingerprint(LocalArtifacts(source))
    blob.write_bytes(bytes([1]) * (3 << 20))
    with pytest.raises(VerificationError, match=r"extra\.bin"):
        check_fingerprint(fingerprint, LocalArtifacts(source))


def test_weights_that_are_no_safetensors_file_are_an_error(source: Path) -> None:
    (source / WEIGHTS).write_bytes(b"\xff" * (2 << 20))
    with pytest.raises(SourceError, match="not a safetensors file"):
        take_fingerprint(LocalArtifacts(source))


def test_a_missing_or_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no folder"):
        take_fingerprint(LocalArtifacts(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match="no files"):
        take_fingerprint(LocalArtifacts(tmp_path))


def test_a_folder_that_is_linked_is_compared_like_any_other(source: Path, tmp_path: Path) -> None:
    shutil.move(source / "model", tmp_path / "elsewhere")
    (source / "model").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(source)
    fingerprint = take_fingerprint(LocalArtifacts(source))
    assert WEIGHTS in {file.path for file in fingerprint.files}
    retrain(source)
    with pytest.raises(VerificationError, match=WEIGHTS):
        check_fingerprint(fingerprint, LocalArtifacts(source))


def test_parts_are_read_in_the_order_asked_for_and_through_links(source: Path, tmp_path: Path) -> None:
    data = (source / WEIGHTS).read_bytes()
    shutil.move(source / WEIGHTS, tmp_path / "blob")
    (source / WEIGHTS).symlink_to(tmp_path / "blob")
    reader = LocalArtifacts(source)
    assert reader.read_many(WEIGHTS, [(500, 7), (3, 0), (0, 9)]) == [data[500:507], b"", data[:9]]
    with pytest.raises(SourceError, match=rf"ends at byte {len(data)}, before {len(data) + 1}"):
        reader.read_many(WEIGHTS, [(0, 1), (len(data) - 1, 2)])


def test_a_header_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    tensors = {f"{'layer' * 20}.{number}": np.ones(100, np.float32) for number in range(3000)}
    save_file(tensors, tmp_path / "model.safetensors")
    header = read_header(LocalArtifacts(tmp_path), "model.safetensors")
    assert header.size > USUAL_HEADER_BYTES
    assert header.tensors.keys() == tensors.keys()


@pytest.mark.parametrize("offsets", ['[0, "4"]', "[0, 4.0]", "[0, 99]", "[-4, 0]", "[0]"])
def test_a_header_with_offsets_that_cannot_be_is_an_error(tmp_path: Path, offsets: str) -> None:
    header = f'{{"a": {{"dtype": "F32", "shape": [1], "data_offsets": {offsets}}}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(SourceError, match="header"):
        read_header(LocalArtifacts(tmp_path), "model.safetensors")


def test_a_fingerprint_without_checksums_is_written_as_it_was_before_there_were_any(source: Path) -> None:
    fingerprint = take_fingerprint(LocalArtifacts(source))
    for file in fingerprint.model_dump(mode="json")["files"]:
        assert file.keys() == {"path", "size", "spans", "sha256"}


@pytest.mark.parametrize(
    ("before", "now", "differ"),
    [
        ({"etag": "a"}, {"etag": "a"}, False),
        ({"etag": "a"}, {"etag": "b"}, True),
        ({"etag": "a", "version_id": "1"}, {"etag": "a", "version_id": "2"}, False),
        ({"etag": "a", "sha256": "x"}, {"etag": "b", "sha256": "x"}, False),
        ({"etag": "a", "sha256": "x"}, {"etag": "a", "sha256": "y"}, True),
        ({"etag": "a", "sha256": "x"}, {"etag": "b"}, True),
    ],
)
def test_checksums_are_compared_as_far_as_both_go(
    before: dict[str, str], now: dict[str, str], differ: bool
) -> None:
    assert StoreChecksum(**now).differs_from(StoreChecksum(**before)) is differ


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
WHOLE = st.integers(0, 2**53 - 1)
CHECKSUMS = st.none() | st.builds(
    StoreChecksum, etag=TEXTS, version_id=st.none() | TEXTS, sha256=st.none() | TEXTS
)
FILES = st.builds(
    FileFingerprint,
    path=TEXTS,
    size=WHOLE,
    spans=st.lists(st.tuples(WHOLE, WHOLE)).map(tuple),
    sha256=TEXTS,
    checksum=CHECKSUMS,
    whole=st.none() | TEXTS,
)


@given(st.lists(FILES).map(tuple))
def test_a_fingerprint_s_json_is_canonical(files: tuple[FileFingerprint, ...]) -> None:
    fingerprint = SourceFingerprint(files=files)
    assert fingerprint.to_bytes() == rfc8785.dumps(fingerprint.model_dump(mode="json"))


def test_two_files_with_one_header_are_told_apart_where_one_is_cut_off(tmp_path: Path) -> None:
    save_file({"weight": np.zeros((64, 64), np.float32)}, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-1])
    reader = LocalArtifacts(tmp_path)
    header = read_header(reader, "whole.safetensors")
    assert read_header(reader, "whole.safetensors").tensors is header.tensors
    with pytest.raises(SourceError, match="cut off"):
        read_header(reader, "cut.safetensors")
    with pytest.raises(TypeError):
        header.tensors["other"] = (0, 1)  # type: ignore[index]
