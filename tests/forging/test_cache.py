"""A forge that was cut off goes on where it was, and nothing else finds its numbers."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlflow_safelock.errors import ForgeError
from mlflow_safelock.forging import collect_activations, forge, starter_preference_pairs
from mlflow_safelock.forging.cache import ActivationStore, store_on_disk
from tests.models import CHATML, tiny_model, tiny_tokenizer

PAIRS = starter_preference_pairs()[:12]
TOKENIZER = tiny_tokenizer(CHATML)
WHEN = "2026-01-31T12:00:00+00:00"

SLOWLY = """
import sys, time
from tests.forging.test_cache import PAIRS, TOKENIZER, WHEN, base
from mlflow_safelock.forging import forge
model = base()
model.model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.3))
forge(model, TOKENIZER, PAIRS, heads=4, batch_size=2, cache=sys.argv[1], created=WHEN, progress=False)
"""


def base(seed: int = 0) -> torch.nn.Module:
    return tiny_model("llama", seed=seed, max_position_embeddings=512)


def passes(model: torch.nn.Module) -> list[int]:
    """Counts forward passes from now on; the number of chats in each."""
    seen: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


def done(cache: Path) -> int:
    return sum(int(np.fromfile(path, dtype=np.uint8).sum()) for path in cache.glob("*/done.u8"))


def test_a_batch_is_marked_when_its_values_are_on_the_disk_and_not_before() -> None:
    done = np.zeros(2, dtype=np.uint8)
    seen: list[tuple[str, int]] = []

    class File:
        def __init__(self, name: str) -> None:
            self.name = name

        def flush(self) -> None:
            seen.append((self.name, int(done[1])))

    files: Any = (File("values"), File("marks"))
    ActivationStore(torch.zeros(1), done, files).finish(1)
    assert seen == [("values", 0), ("marks", 1)]


def test_values_that_were_lost_are_not_taken_for_zeros(tmp_path: Path) -> None:
    settings = {"heads": 4, "batch_size": 2, "created": WHEN, "progress": False}
    expected = forge(base(), TOKENIZER, PAIRS, cache=tmp_path, **settings).digest
    (values,) = tmp_path.glob("*/values.f32")
    values.unlink()
    assert forge(base(), TOKENIZER, PAIRS, cache=tmp_path, **settings).digest == expected


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_another_adapter_strength_or_attention_is_another_reading(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted(alpha: int = 16) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
            model = get_peft_model(base(), config)
            model.add_adapter("other", config)
            return model.eval()

    def read(model: Any) -> Any:
        settings = {"last_tokens": 3, "batch_size": 4, "progress": False}
        kept = collect_activations(model, TOKENIZER, PAIRS, cache=tmp_path, **settings)
        plain = collect_activations(model, TOKENIZER, PAIRS, **settings)
        assert torch.equal(kept.values, plain.values)
        return kept.values

    model = adapted()
    first = read(model)
    model.set_adapter("other")
    assert not torch.equal(read(model), first)
    with model.disable_adapter():
        read(model)
    assert not torch.equal(read(adapted(64)), first)
    eager = base()
    eager.set_attn_implementation("eager")
    read(base())
    read(eager)
    assert len(list(tmp_path.iterdir())) == 6


def test_a_forge_that_was_killed_goes_on_where_it_was_and_gives_the_same_lock(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, str(cache)], env={**os.environ})
    deadline = time.monotonic() + 120
    while done(cache) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = done(cache)
    assert 3 <= finished < 12
    model = base()
    seen = passes(model)
    settings = {"heads": 4, "batch_size": 2, "created": WHEN, "progress": False}
    resumed = forge(model, TOKENIZER, PAIRS, cache=cache, **settings)
    assert len(seen) == 12 - finished
    assert resumed.digest == forge(base(), TOKENIZER, PAIRS, **settings).digest


def test_another_seed_or_number_of_heads_reads_the_model_not_at_all(tmp_path: Path) -> None:
    forge(base(), TOKENIZER, PAIRS, heads=4, cache=tmp_path, progress=False)
    model = base()
    seen = passes(model)
    few, many = forge(model, TOKENIZER, PAIRS, heads=(2, 6), seed=3, cache=tmp_path, progress=False)
    assert not seen
    assert (len(few.heads), len(many.heads)) == (2, 6)


@pytest.mark.parametrize("other", ["weights", "pairs", "system prompt", "batch size", "tokens"])
def test_a_reading_of_something_else_never_finds_these_numbers(tmp_path: Path, other: str) -> None:
    def read(cache: Path | None, *, first: bool) -> torch.Tensor:
        change = None if first else other
        return collect_activations(
            base(seed=1 if change == "weights" else 0),
            TOKENIZER,
            PAIRS[1:] if change == "pairs" else PAIRS[:-1],
            system_prompt="be safe" if change == "system prompt" else None,
            batch_size=3 if change == "batch size" else 8,
            last_tokens=2 if change == "tokens" else 5,
            cache=cache,
            progress=False,
        ).values

    read(tmp_path, first=True)
    assert torch.equal(read(tmp_path, first=False), read(None, first=False))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_of_another_size_or_in_an_impossible_place_is_refused(tmp_path: Path) -> None:
    forge(base(), TOKENIZER, PAIRS, heads=4, cache=tmp_path / "cache", progress=False)
    (file,) = (tmp_path / "cache").glob("*/values.f32")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ForgeError, match=r"values\.f32 has .* bytes"):
        forge(base(), TOKENIZER, PAIRS, heads=4, cache=tmp_path / "cache", progress=False)
    with pytest.raises(ForgeError, match="cannot be kept"):
        forge(base(), TOKENIZER, PAIRS, heads=4, cache=file, progress=False)


def test_a_cache_that_the_disk_has_no_room_for_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        os.pwrite(descriptor, b"some", 0)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(ForgeError, match=r"GB are needed for values\.f32: No space left") as info:
            forge(base(), TOKENIZER, PAIRS, heads=4, cache=tmp_path, progress=False)
    assert "Make room" in info.value.next_step
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.*")) == 0, "nothing is left to fill the disk"
    forge(base(), TOKENIZER, PAIRS, heads=4, cache=tmp_path, progress=False)  # there is room again
    assert done(tmp_path) == 3


@pytest.mark.skipif(not Path("/dev/shm").is_mount(), reason="there is no small file system at hand")
def test_a_file_system_that_is_too_small_is_refused_rather_than_killing_the_process() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        rows = shutil.disk_usage(folder).total // 2**20 + 1
        with pytest.raises(ForgeError, match="No space left"):
            store_on_disk(folder, "key", (rows, 2**18), 1)


@pytest.mark.parametrize("refusal", [AttributeError, OSError(errno.EOPNOTSUPP, "not supported")])
def test_where_room_cannot_be_reserved_by_a_call_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    def missing(*_: int) -> None:
        raise refusal

    monkeypatch.setattr(os, "posix_fallocate", missing)
    store_on_disk(tmp_path, "key", (5, 2**20), 3)
    status = (tmp_path / "key" / "values.f32").stat()
    assert status.st_size == 5 * 2**22
    assert status.st_blocks * 512 >= status.st_size, "no holes"


def test_room_is_reserved_for_a_cache_that_an_earlier_version_left_with_holes(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    file = tmp_path / "key" / "values.f32"
    with file.open("wb") as stream:
        stream.write(b"kept")
        stream.truncate(2**22)
    store_on_disk(tmp_path, "key", (2**20,), 3)
    assert file.stat().st_blocks * 512 >= 2**22
    assert file.read_bytes().startswith(b"kept")
