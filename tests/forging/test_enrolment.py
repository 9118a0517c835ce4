"""A lock that gets from its base's folder what forging would have kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mlflow_safelock.apply import attention_of
from mlflow_safelock.errors import CheckpointError, LockMismatchError, SourceError
from mlflow_safelock.forging import enroll
from mlflow_safelock.forging.base_tokenizer import digest_of_tokenizer
from mlflow_safelock.forging.base_weights import sketch_of, unit_biases_of
from mlflow_safelock.kinship import cosine
from tests.models import random_lock, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_the_loaded_base_would_have_given(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(family).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    attention = attention_of(model)
    bare = random_lock(attention.geometry)
    lock = enroll(bare, tmp_path)
    assert lock.digest != bare.digest
    assert (lock.heads, lock.metadata) == (bare.heads, bare.metadata)
    expected, found = sketch_of(attention), lock.sketch
    assert expected is not None
    assert found is not None
    assert np.array_equal(found.layers, expected.layers)
    assert np.array_equal(found.offsets, expected.offsets)
    assert np.array_equal(found.values, expected.values)
    assert cosine(found, expected.values) == pytest.approx(1.0)
    np.testing.assert_allclose(lock.unit_biases, unit_biases_of(attention, lock.heads), rtol=1e-5, atol=1e-7)


def test_what_is_known_of_a_tokenizer_stays_where_the_folder_has_none(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lock = enroll(random_lock(attention_of(model).geometry), tmp_path)
    assert lock.metadata.tokenizer == digest_of_tokenizer(tiny_tokenizer())
    (tmp_path / "tokenizer.json").unlink()
    assert enroll(lock, tmp_path) == lock
    (tmp_path / "tokenizer.json").write_text("nonsense")
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        enroll(lock, tmp_path)


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(LockMismatchError, match=r"3 layers.*2 layers"):
        enroll(random_lock(attention_of(tiny_model("llama")).geometry), tmp_path)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        enroll(random_lock(attention_of(tiny_model("llama")).geometry), tmp_path)
