"""Locks are told apart by what they differ in, and those that push the same heads are one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlflow_safelock.evaluate import fewer_heads
from mlflow_safelock.evaluate.axes import Axes, distinct, settings_of
from mlflow_safelock.lock import LockedHead, SafetyLock
from tests.toy import Toy


def made_with(lock: SafetyLock, **settings: Any) -> SafetyLock:
    return replace(lock, metadata=lock.metadata.model_copy(update=settings))


def test_only_what_differs_is_named(toy: Toy) -> None:
    eight, four = toy.lock, *fewer_heads(toy.lock, [4])
    assert [Axes.between([eight, four]).label(lock) for lock in (eight, four)] == ["8 heads", "4 heads"]
    locks = [eight, made_with(eight, last_tokens=3), made_with(four, seed=7)]
    axes = Axes.between(locks)
    assert [axes.label(lock) for lock in locks] == [
        f"8 heads (r {eight.metadata.last_tokens}, split seed 0)",
        "8 heads (r 3, split seed 0)",
        f"4 heads (r {eight.metadata.last_tokens}, split seed 7)",
    ]
    assert axes.values(locks[1]) == {"last_tokens": "3", "split_seed": "0"}
    others = [made_with(eight, split="row", train_fraction=0.75), made_with(eight, split=None)]
    axes = Axes.between(others)
    assert axes.label(others[0]) == "8 heads (split by row, 0.75 for training)"
    assert axes.label(others[1]) == "8 heads (split by unknown, 0.6 for training)"
    assert settings_of(others[0]) == {
        "last_tokens": eight.metadata.last_tokens,
        "split": "row",
        "train_fraction": 0.75,
        "split_seed": 0,
    }


def test_what_differs_in_nothing_else_is_told_apart_by_its_digest(toy: Toy) -> None:
    locks = [toy.lock, made_with(toy.lock, created="2026-01-31T12:00:00+00:00")]
    assert len({Axes.between(locks).label(lock) for lock in locks}) == 2
    assert Axes.between(locks).values(toy.lock) == {"lock": toy.lock.digest[7:19]}
    assert Axes.between([toy.lock, toy.lock]).label(toy.lock) == "8 heads"


def test_locks_that_push_the_same_heads_are_one(toy: Toy) -> None:
    lock = toy.lock
    again, four = made_with(lock, seed=7), *fewer_heads(lock, [4])
    first = lock.heads[0]
    turned = LockedHead(first.layer, first.head, -first.direction, first.std)
    wider = LockedHead(first.layer, first.head, first.direction, 2 * first.std)
    others = [replace(lock, heads=(head, *lock.heads[1:]), unit_biases=None) for head in (turned, wider)]
    found, same = distinct([lock, again, four, *others])
    assert found == (lock, four, *others)
    assert same == {again.digest: lock}
