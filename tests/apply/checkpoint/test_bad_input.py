"""Input that cannot be used: a typed error, nothing left behind, and the source as it was."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from mlflow_safelock.apply import save_locked_checkpoint
from mlflow_safelock.apply.checkpoint import save as saving
from mlflow_safelock.errors import AlphaError, AlreadyLockedError, CheckpointError
from tests.apply.checkpoint.conftest import beside, load, snapshot
from tests.apply.conftest import logits


def refused(source: Path, lock, message: str, error: type[Exception] = CheckpointError, **options) -> None:
    before, there = snapshot(source), beside(source)
    with pytest.raises(error, match=message):
        save_locked_checkpoint(source, source.parent / "locked", lock, **options)
    assert snapshot(source) == before
    assert beside(source) == there


def second_shard(source: Path) -> Path:
    return sorted(source.glob("*.safetensors"))[1]


@pytest.mark.parametrize("verify", ["reload", "structure"])
@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_a_truncated_shard(left, verify, save_fine_tune):
    source, lock = save_fine_tune(shard="20KB")
    shard = second_shard(source)
    shard.write_bytes(shard.read_bytes()[:left])
    refused(source, lock, rf"{shard.name} is damaged.*again", verify=verify)


def test_an_index_that_names_a_missing_shard(save_fine_tune):
    source, lock = save_fine_tune(shard="20KB")
    shard = second_shard(source)
    shard.unlink()
    refused(source, lock, rf"{shard.name}.*missing.*again")


def test_a_shard_that_is_a_link_to_nowhere(save_fine_tune):
    source, lock = save_fine_tune(shard="20KB")
    shard = second_shard(source)
    shard.unlink()
    shard.symlink_to(source / "nowhere")
    refused(source, lock, rf"{shard.name}.*missing")


@pytest.mark.parametrize("claimed", ["F64", "BF16", "I8"])
def test_a_header_that_claims_another_dtype_than_the_bytes_have(claimed, save_fine_tune):
    source, lock = save_fine_tune()
    change_header(source / "model.safetensors", lambda entry: entry.update(dtype=claimed))
    refused(source, lock, r"model\.safetensors is damaged")


def test_a_tensor_of_another_dtype_than_the_configuration_says(save_fine_tune):
    source, lock = save_fine_tune()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    refused(source, lock, r"_proj\.weight.* is stored as F32, .*bfloat16.*dtype='auto'")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "README.md"])
@pytest.mark.parametrize("change", ["edited", "replaced", "swapped for a twin", "gone"])
def test_a_source_that_changes_while_it_is_locked(name, change, save_fine_tune, tmp_path, monkeypatch):
    source, lock = save_fine_tune()
    write_record = saving.write_record

    def and_then_it_changes(*arguments):
        write_record(*arguments)
        path = source / name
        status = path.stat()
        if change == "edited":
            os.utime(path, ns=(1, 1))
        elif change == "gone":
            path.unlink()
        else:
            twin = tmp_path / "twin"
            twin.write_bytes(path.read_bytes())
            if change == "swapped for a twin":
                os.utime(twin, ns=(status.st_atime_ns, status.st_mtime_ns))
            twin.replace(path)

    monkeypatch.setattr(saving, "write_record", and_then_it_changes)
    with pytest.raises(
        CheckpointError, match=r"changed while it was being locked.*Wait|could not be written"
    ):
        save_locked_checkpoint(source, tmp_path / "locked", lock, verify="structure")
    assert beside(source) == {"fine-tune"}


@pytest.mark.parametrize("call", ["copy_file_range", "fsync", "mkdir", "rename"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_disk_that_is_full_in_the_middle(call, family, save_fine_tune, monkeypatch):
    source, lock = save_fine_tune(family)
    original: Callable[..., object] = getattr(os, call)
    calls = []

    def full(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) >= (2 if call in ("copy_file_range", "fsync") else 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **options)

    monkeypatch.setattr(os, call, full)
    refused(source, lock, r"could not be written.*No space.*free space", sharing="copy")
    assert calls


def test_symlinked_shards_as_in_a_hub_cache(save_fine_tune, tmp_path):
    source, lock = save_fine_tune(shard="20KB")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(source.glob("*.safetensors"))):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    unlocked, before = logits(load(source)), snapshot(source)
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    assert not any(path.is_symlink() for path in (tmp_path / "locked").iterdir())
    assert snapshot(source) == before
    assert (logits(load(tmp_path / "locked")) - unlocked).abs().max() > 0.02


def test_a_configuration_without_the_name_of_a_class_is_enough(save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": None}))
    save_locked_checkpoint(source, tmp_path / "locked", lock)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_source_that_is_locked(family, save_fine_tune, tmp_path):
    source, lock = save_fine_tune(family)
    locked = tmp_path / "already"
    save_locked_checkpoint(source, locked, lock)
    refused(locked, lock, "saved with a lock", AlreadyLockedError)
    config = json.loads((locked / "config.json").read_text())
    del config["safelock"]
    (locked / "config.json").write_text(json.dumps(config))
    refused(locked, lock, r"safelock.*unlock_checkpoint", AlreadyLockedError)


@pytest.mark.parametrize("alpha", [0, 0.0, -0.0, float("nan"), float("inf"), "6", None, True, 1e300])
def test_an_alpha_that_is_no_strength(alpha, save_fine_tune):
    source, lock = save_fine_tune()
    refused(source, lock, "[Aa]lpha", AlphaError, alpha=alpha)


def test_a_locked_column_that_holds_no_number(save_fine_tune):
    source, lock = save_fine_tune()
    tensors = load_file(source / "model.safetensors")
    layer, head = lock.heads[0].layer, lock.heads[0].head
    tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][0, head * 8] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, lock, rf"layer {layer}", AlphaError)


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        (torch.zeros(40), r"F32 of shape \(40,\)"),
        (torch.zeros(1), r"F32 of shape \(1,\)"),
        (torch.zeros(48, dtype=torch.int32), r"I32 of shape \(48,\)"),
    ],
)
def test_a_bias_of_the_models_own_that_is_none(bias, said, save_fine_tune):
    source, lock = save_fine_tune("gpt2")
    tensors = load_file(source / "model.safetensors")
    tensors[f"transformer.h.{lock.layers[0]}.attn.c_proj.bias"] = bias
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, lock, said)


def test_a_link_to_itself_in_the_source_is_no_matter(save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    (source / "loop").symlink_to(source / "loop")
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    assert not (tmp_path / "locked" / "loop").exists()


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "config.json", ""])
def test_what_cannot_be_read_is_named_and_not_called_damaged(name, save_fine_tune, monkeypatch):
    source, lock = save_fine_tune()
    forbidden = source / name if name else source

    def checked(original: Callable[..., object]) -> Callable[..., object]:
        def call(path: object, *arguments: object, **options: object) -> object:
            if isinstance(path, str | os.PathLike) and Path(path) == forbidden:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return original(path, *arguments, **options)

        return call

    with monkeypatch.context() as denied:
        # Of the user who runs tests nothing may be withheld.
        for module, call in ((io, "open"), (os, "listdir")):
            denied.setattr(module, call, checked(getattr(module, call)))
        denied.setattr(os, "access", lambda path, _: Path(path) != forbidden)
        with pytest.raises(CheckpointError, match=r"cannot be read.*[Pp]ermission denied"):
            save_locked_checkpoint(source, source.parent / "locked", lock)
    assert beside(source) == {"fine-tune"}


def test_a_fine_tune_that_does_not_run(save_fine_tune, monkeypatch):
    source, lock = save_fine_tune()

    def forward(*_: object, **__: object) -> None:
        raise RuntimeError("expected m1 and m2 to have the same dtype")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    refused(source, lock, r"cannot be run on 32 tokens.*whether the fine-tune itself runs")


def test_an_alpha_that_leaves_nothing_of_the_model(save_fine_tune):
    source, lock = save_fine_tune()
    refused(source, lock, r"At alpha 1e\+30 the locked model says nothing", alpha=1e30)


@pytest.mark.parametrize("name", ["loop", "nul\0"])
def test_a_source_that_is_no_path(name, save_fine_tune, tmp_path):
    _, lock = save_fine_tune()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match=r"cannot be read|There is no folder"):
        save_locked_checkpoint(tmp_path / name, tmp_path / "locked", lock)


@pytest.mark.parametrize("name", ["lock\0ed", "lock\udcffed"])
def test_a_destination_that_is_no_path(name, save_fine_tune):
    source, lock = save_fine_tune()
    with pytest.raises(CheckpointError, match=r"a NUL in it, or it is not UTF-8"):
        save_locked_checkpoint(source, source.parent / name, lock)
    assert beside(source) == {"fine-tune"}


@pytest.mark.parametrize(
    "name", [b"note\xff.txt", b"vocab\\x.json", b"additional_chat_templates/r\xff.jinja"], ids=str
)
def test_a_file_of_a_name_that_not_every_system_can_have(name, save_fine_tune):
    source, lock = save_fine_tune()
    path = os.path.join(os.fsencode(source), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(b"x")
    refused(source, lock, r"can hold no file of the name .*not UTF-8, or with a backslash")


def test_an_index_that_names_a_shard_with_a_backslash(save_fine_tune):
    source, lock = save_fine_tune(shard="20KB")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = second_shard(source)
    renamed = {shard.name: "shards\\second.safetensors"}
    shard.rename(source / renamed[shard.name])
    places = {tensor: renamed.get(file, file) for tensor, file in index["weight_map"].items()}
    path.write_text(json.dumps({**index, "weight_map": places}))
    refused(source, lock, "can hold no file of the name")


@pytest.mark.parametrize(
    ("value", "message"),
    [({"architectures": 5}, "the architectures 5, which is no list"), ({"note": "\ud800"}, "cannot be read")],
)
def test_a_configuration_with_a_value_that_is_none(value, message, save_fine_tune):
    source, lock = save_fine_tune()
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **value}))
    refused(source, lock, message)


@pytest.mark.parametrize("components", [5, [["tokenizer"]]])
def test_components_that_are_no_names(components, save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    logged = tmp_path / "logged"
    logged.mkdir()
    source.rename(logged / "model")
    flavor = {"model_binary": "model", "components": components}
    (logged / "MLmodel").write_text(json.dumps({"flavors": {"transformers": flavor}}))
    refused(logged, lock, "which is no list of names")


@pytest.mark.parametrize("name", ["README.md", "model.safetensors.index.json", "x.json"])
def test_a_folder_of_the_name_of_a_file_is_left_out(name, save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    (source / name).unlink(missing_ok=True)
    (source / name).mkdir()
    save_locked_checkpoint(source, tmp_path / "locked", lock)


def test_chat_templates_in_a_folder_that_is_a_link_are_carried(save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "rag.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").symlink_to(tmp_path / "templates")
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    assert (tmp_path / "locked" / "additional_chat_templates" / "rag.jinja").read_text() == "{{ messages }}"


def change_header(path: Path, change: Callable[[dict], None]) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header["model.layers.1.self_attn.o_proj.weight"])
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])
