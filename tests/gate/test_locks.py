"""Locks that were read are kept, for the next promotion, within bounds."""

from __future__ import annotations

import pytest

from mlflow_safelock.errors import LockError
from mlflow_safelock.formats import lock_to_bytes
from mlflow_safelock.gate import locks
from mlflow_safelock.lock import AttentionGeometry
from tests.models import random_lock

GEOMETRY = AttentionGeometry(layers=2, heads=4, head_dim=8, hidden=32)


@pytest.fixture(autouse=True)
def nothing_kept():
    locks._kept.cache_clear()
    yield
    locks._kept.cache_clear()


def test_the_same_bytes_are_parsed_once_and_others_anew():
    one, other = (lock_to_bytes(random_lock(GEOMETRY, seed=seed)) for seed in (1, 2))
    first = locks._parsed(one, "models:/lock/1")
    assert locks._parsed(bytes(bytearray(one)), "models:/lock/1") is first
    assert locks._parsed(other, "models:/lock/1").digest != first.digest


def test_no_more_than_a_few_are_kept():
    for seed in range(3 * locks.KEPT_LOCKS):
        locks._parsed(lock_to_bytes(random_lock(GEOMETRY, seed=seed)), "models:/lock/1")
    assert locks._kept.cache_info().currsize == locks.KEPT_LOCKS


def test_a_large_one_is_read_and_not_kept(monkeypatch):
    data = lock_to_bytes(random_lock(GEOMETRY))
    monkeypatch.setattr(locks, "KEPT_BYTES", len(data) - 1)
    assert locks._parsed(data, "models:/lock/1").digest == random_lock(GEOMETRY).digest
    assert locks._kept.cache_info().currsize == 0


def test_what_is_no_lock_is_an_error_each_time():
    for _ in range(2):
        with pytest.raises(LockError):
            locks._parsed(b"no lock", "models:/lock/1")
