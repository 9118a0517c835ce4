"""Controls are as strong as the lock and differ from it in their directions only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlflow_safelock.reproduction.arms import random_lock, shuffled_lock, subtracted, task_vector
from mlflow_safelock.reproduction.world import make_tokenizer
from mlflow_safelock.toys import new_llama
from tests.locks import make_lock


@pytest.mark.parametrize("control", [random_lock, shuffled_lock])
def test_a_control_has_the_locks_heads_and_stds_and_unit_directions(control) -> None:
    lock = make_lock()
    made = control(lock, 0)
    assert [(one.layer, one.head, one.std) for one in made.heads] == [
        (one.layer, one.head, one.std) for one in lock.heads
    ]
    for one, other in zip(made.heads, lock.heads, strict=True):
        assert np.linalg.norm(one.direction) == pytest.approx(1.0, abs=1e-5)
        assert not np.allclose(one.direction, other.direction)
    assert made == control(lock, 0)
    assert len({control(lock, seed).digest for seed in range(20)}) > 1


@pytest.mark.parametrize("seed", range(10))
def test_shuffling_keeps_the_directions_and_leaves_none_at_its_head(seed: int) -> None:
    lock = make_lock()
    before = [tuple(one.direction) for one in lock.heads]
    after = [tuple(one.direction) for one in shuffled_lock(lock, seed).heads]
    assert sorted(before) == sorted(after)
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_a_task_vector_taken_off_whole_gives_the_base_back() -> None:
    shape = {"layers": 1, "heads": 2, "key_value_heads": 2, "positions": 8}
    base, other = (new_llama(make_tokenizer(), **shape, seed=seed) for seed in (0, 1))
    vector = task_vector(base, other)
    whole, half = subtracted(other, vector, 1.0), subtracted(other, vector, 0.5)
    models = (other, whole, half)
    weights = zip(base.named_parameters(), *(model.parameters() for model in models), strict=True)
    for (name, start), end, back, middle in weights:
        torch.testing.assert_close(back, start, msg=name)
        torch.testing.assert_close(middle, (start + end) / 2, msg=name)
    assert not torch.equal(base.lm_head.weight, other.lm_head.weight)
