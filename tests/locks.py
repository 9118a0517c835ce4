"""Locks made by hand for the tests of the centre and of the formats."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from mlflow_safelock.kinship import KinshipSketch
from mlflow_safelock.lock import AttentionGeometry, LockedHead, LockMetadata, SafetyLock

GEOMETRY = AttentionGeometry(layers=3, heads=4, head_dim=5, hidden=20)


def unit(*values: float) -> np.ndarray:
    vector = np.array(values, dtype=np.float64)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def metadata_values(**changes: Any) -> dict[str, Any]:
    return {
        "base_model": "example/base-7b",
        "base_revision": "0123abc",
        "architecture": "llama",
        "geometry": GEOMETRY,
        "origin": "forged",
        "last_tokens": 5,
        "pairs": 100,
        "split": "pair",
        "train_fraction": 0.6,
        "seed": 0,
        "system_prompt": "Be kind, “always”.\n",
        "dataset_digest": "sha256:" + "0a" * 32,
        "default_alpha": 6.0,
        "created": "2026-01-31T12:00:00+00:00",
        "tools": {"mlflow-safelock": "0.1.0", "torch": "2.13.0"},
    } | changes


def metadata(**changes: Any) -> LockMetadata:
    return LockMetadata.parse(metadata_values(**changes))


def heads() -> tuple[LockedHead, ...]:
    return (
        LockedHead(0, 3, unit(1, 2, 3, 4, 5), 0.25),
        LockedHead(1, 0, unit(-1, 0, 0, 0, 1), 1.5),
        LockedHead(1, 2, unit(0, 1, 0, 0, 0), 1e-3),
        LockedHead(2, 1, unit(2, -2, 1, 0.5, 0), 7.0),
    )


def scores() -> np.ndarray:
    return (np.arange(12, dtype=np.float32).reshape(3, 4) / 16 + 0.25).astype(np.float32)


def unit_biases() -> np.ndarray:
    return (np.arange(80, dtype=np.float32).reshape(4, 20) / 32 - 1).astype(np.float32)


def sketch(**changes: Any) -> KinshipSketch:
    values = {
        "layers": np.array([0, 2], dtype=np.int32),
        "offsets": np.array([[0, 10, 30], [7, 100, 396]], dtype=np.int64),
        "values": (np.arange(24, dtype=np.float16).reshape(2, 3, 4) / 8 - 1).astype(np.float16),
    }
    return KinshipSketch(**(values | changes))


def make_lock(**changes: Any) -> SafetyLock:
    return SafetyLock(heads(), metadata(**changes), scores())


def make_full_lock(**changes: Any) -> SafetyLock:
    """A lock with everything that a lock may hold."""
    return SafetyLock(heads(), metadata(**changes), scores(), unit_biases(), sketch())


def _directions(head_dim: int) -> st.SearchStrategy[np.ndarray]:
    number = st.floats(-1.0, 1.0, width=32)
    vectors = st.lists(number, min_size=head_dim, max_size=head_dim)
    return vectors.filter(lambda v: np.linalg.norm(np.array(v, dtype=np.float64)) > 1e-3).map(
        lambda v: unit(*v)
    )


# Characters that formats stumble over: quotes, controls, two-unit and four-byte ones, and lookalikes.
_ALPHABET = list("ab 7./\\\"'{}[]:,\n\t\x00\x7f\u0080é\u0301“\u2028\ufeff\ufffd\uffff😀")
_TEXT = st.text(_ALPHABET, max_size=12)
_NAME = st.text(_ALPHABET, min_size=1, max_size=12)
_COUNT = st.integers(1, 2**31 - 1)


@st.composite
def any_lock(draw: st.DrawFn) -> SafetyLock:
    """Any lock of a small geometry."""
    layers, heads_, head_dim = (draw(st.integers(1, limit)) for limit in (4, 4, 6))
    hidden = draw(st.integers(1, 6) | _COUNT)
    geometry = AttentionGeometry(layers=layers, heads=heads_, head_dim=head_dim, hidden=hidden)
    places = st.tuples(st.integers(0, layers - 1), st.integers(0, heads_ - 1))
    stds = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
    locked = [
        LockedHead(layer, head, draw(_directions(head_dim)), draw(stds))
        for layer, head in draw(st.lists(places, min_size=1, max_size=6, unique=True))
    ]
    values = draw(
        st.fixed_dictionaries(
            {
                "base_model": _NAME,
                "base_revision": st.none() | _NAME,
                "architecture": st.none() | _NAME,
                "origin": st.sampled_from(["forged", "published"]),
                "last_tokens": st.none() | _COUNT,
                "pairs": st.none() | _COUNT,
                "split": st.sampled_from([None, "pair", "row", "given"]),
                "train_fraction": st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
                "seed": st.none() | st.integers(0, 2**53 - 1),
                "system_prompt": st.none() | _TEXT,
                "dataset_digest": st.none()
                | st.binary(min_size=32, max_size=32).map(lambda b: f"sha256:{b.hex()}"),
                "default_alpha": stds,
                "created": st.none() | st.just("2026-01-31T12:00:00Z"),
                "tools": st.none() | st.dictionaries(_TEXT, _TEXT, max_size=3),
            }
        )
    )
    known = draw(
        st.none() | st.lists(st.floats(0, 1, width=32), min_size=layers * heads_, max_size=layers * heads_)
    )
    table = None if known is None else np.array(known, dtype=np.float32).reshape(layers, heads_)
    biases = draw(_unit_biases(len(locked), hidden)) if hidden <= 6 else None
    return SafetyLock(
        tuple(locked),
        LockMetadata.parse({**values, "geometry": geometry}),
        table,
        biases,
        draw(st.none() | _sketches(geometry)),
    )


def _unit_biases(count: int, hidden: int) -> st.SearchStrategy[np.ndarray | None]:
    number = st.floats(width=32, allow_nan=False, allow_infinity=False)
    rows = st.lists(number, min_size=count * hidden, max_size=count * hidden)
    return st.none() | rows.map(lambda row: np.array(row, dtype=np.float32).reshape(count, hidden))


@st.composite
def _sketches(draw: st.DrawFn, geometry: AttentionGeometry) -> KinshipSketch:
    numbers = geometry.heads * geometry.head_dim * geometry.hidden
    layers = draw(st.lists(st.integers(0, geometry.layers - 1), min_size=1, unique=True).map(sorted))
    runs, length = draw(st.integers(1, 3)), draw(st.integers(1, min(numbers, 4)))
    places = len(layers) * runs
    starts = draw(st.lists(st.integers(0, numbers - length), min_size=places, max_size=places))
    number = st.floats(width=16, allow_nan=False, allow_infinity=False)
    values = draw(st.lists(number, min_size=places * length, max_size=places * length).filter(any))
    return KinshipSketch(
        np.array(layers, dtype=np.int32),
        np.array(starts, dtype=np.int64).reshape(len(layers), runs),
        np.array(values, dtype=np.float16).reshape(len(layers), runs, length),
    )
