from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mlflow_safelock.apply.checkpoint import save_locked_checkpoint, unlock_checkpoint
from mlflow_safelock.apply.checkpoint.writing import write_over
from mlflow_safelock.errors import CheckpointError
from tests.apply.checkpoint.conftest import beside, load, snapshot
from tests.apply.conftest import logits

FAMILIES = ["llama", "mistral", "gpt2", "gpt_neox"]


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in snapshot(folder).items()}


def change_record(folder: Path, change) -> None:
    path = folder / "safelock.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("sharing", ["link", "copy"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_unlocked_copy_equals_the_source_byte_for_byte(family, shard, sharing, save_fine_tune, tmp_path):
    source, lock = save_fine_tune(family, shard=shard)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    before = digests(source)
    save_locked_checkpoint(source, tmp_path / "locked", lock, 4.0, sharing=sharing)
    assert digests(tmp_path / "locked") != before

    report = unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked", sharing=sharing)

    assert digests(tmp_path / "unlocked") == before
    assert digests(source) == before
    assert (report.lock, report.alpha, set(report.files)) == (lock.digest, 4.0, set(before))


def test_an_unlocked_copy_can_be_locked_again(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("qwen2", card="")
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    assert not (tmp_path / "unlocked" / "README.md").exists()
    save_locked_checkpoint(tmp_path / "unlocked", tmp_path / "again", lock)
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "locked")


def test_the_source_is_not_needed_any_more(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("gpt2")
    before, unlocked = digests(source), logits(load(source))
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    for path in source.iterdir():
        path.unlink()
    unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    assert digests(tmp_path / "unlocked") == before
    assert (logits(load(tmp_path / "unlocked")) == unlocked).all()


def test_weights_of_an_unlocked_copy_cost_nothing(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    report = save_locked_checkpoint(source, tmp_path / "locked", lock)
    unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    if set(report.shared.values()) == {"hard link"}:
        assert (tmp_path / "unlocked" / "model.safetensors").samefile(source / "model.safetensors")


def test_what_the_lock_changed_is_changed_back_in_a_copy_only(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("gpt_neox")
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    locked = digests(tmp_path / "locked")
    unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    assert digests(tmp_path / "locked") == locked
    assert load_file(tmp_path / "unlocked" / "model.safetensors").keys()


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "model-00001-of-00001.safetensors"]
)
def test_a_file_that_was_changed_after_locking_is_named(name, save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    save_locked_checkpoint(source, tmp_path / "locked", lock, sharing="copy")
    path = tmp_path / "locked" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(tmp_path, rf"{name} is not the file that was locked")


def test_missing_files_are_named(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    (tmp_path / "locked" / "tokenizer.json").unlink()
    refused(tmp_path, r"tokenizer\.json is not the file")
    (tmp_path / "locked" / "model-00001-of-00001.safetensors").unlink()
    refused(tmp_path, "model-00001-of-00001.safetensors is missing")
    (tmp_path / "locked" / "safelock.json").unlink()
    refused(tmp_path, r"has no safelock\.json")


@pytest.mark.parametrize(
    "name", ["../escaped", "/tmp/escaped", "a/../../escaped", "", ".", "..\\escaped", "nul\0", "/"]
)
def test_a_record_leads_nowhere_else(name, save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    change_record(tmp_path / "locked", lambda record: record["rewritten"][0].update(name=name))
    refused(tmp_path, "not the name of a file")
    change_record(tmp_path / "locked", lambda record: record["rewritten"][0].update(name="config.json"))
    change_record(tmp_path / "locked", lambda record: record["weights"][0].update(locked_name=name))
    refused(tmp_path, "not the name of a file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(format_version=2), "format_version"),
        (lambda record: record.pop("weights"), "weights"),
        (lambda record: record["kept"].append(record["kept"][0]), "names a file twice"),
        (lambda record: record["rewritten"][0].update(content="no base 64!"), "damaged"),
        (lambda record: record["weights"][0].update(sample="0"), "not the file that was locked"),
    ],
)
def test_a_record_that_cannot_be_right_is_refused(change, message, save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    change_record(tmp_path / "locked", change)
    refused(tmp_path, message)


@pytest.mark.parametrize("name", ["loop", "nul\0", "y" * 300])
def test_a_locked_folder_that_is_no_path_is_refused(name, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match=r"cannot be read|has no safelock\.json"):
        unlock_checkpoint(tmp_path / name, tmp_path / "unlocked")
    assert not (tmp_path / "unlocked").exists()


def test_a_record_that_cannot_be_opened_is_named(save_fine_tune, tmp_path, monkeypatch):
    source, lock = save_fine_tune("llama")
    save_locked_checkpoint(source, tmp_path / "locked", lock)

    def read_bytes(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)  # of the user who runs tests nothing may be withheld
    refused(tmp_path, r"cannot be read: .*Permission denied")


def test_changed_bytes_that_no_file_has_are_refused(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("gpt2")
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    change_record(
        tmp_path / "locked", lambda record: record["weights"][0]["changed"][0].update(begin=1 << 63)
    )
    refused(tmp_path, r"weights\.0\.changed\.0\.begin")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_record_that_is_no_object_is_refused(content, save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    (tmp_path / "locked" / "safelock.json").write_bytes(content)
    refused(tmp_path, r"safelock\.json cannot be read")


def test_an_existing_destination_is_left_alone(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("llama")
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    os.makedirs(tmp_path / "unlocked" / "precious")
    with pytest.raises(CheckpointError, match="exists already"):
        unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    assert [path.name for path in (tmp_path / "unlocked").iterdir()] == ["precious"]


def refused(tmp_path: Path, message: str) -> None:
    there = beside(tmp_path / "locked")
    with pytest.raises(CheckpointError, match=message):
        unlock_checkpoint(tmp_path / "locked", tmp_path / "unlocked")
    assert beside(tmp_path / "locked") == there


def test_a_destination_in_the_locked_folder_is_refused(save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    before = snapshot(tmp_path / "locked")
    with pytest.raises(CheckpointError, match=r"lies in .*Name another folder"):
        unlock_checkpoint(tmp_path / "locked", tmp_path / "locked" / "again")
    assert snapshot(tmp_path / "locked") == before


def test_nothing_is_written_into_a_file_that_somebody_else_has_too(tmp_path):
    (tmp_path / "one").write_bytes(b"theirs")
    (tmp_path / "other").hardlink_to(tmp_path / "one")
    with pytest.raises(CheckpointError, match="hard link"):
        write_over(tmp_path / "other", 0, b"ours")
    assert (tmp_path / "one").read_bytes() == b"theirs"
