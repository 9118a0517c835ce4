"""The sketch of a base's weights, and how alike two models are by it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_safelock.errors import LockValidationError
from mlflow_safelock.kinship import (
    MAX_LAYERS,
    RUN_LENGTH,
    RUNS,
    KinshipSketch,
    cosine,
    sampled_layers,
    sampled_offsets,
)
from tests.locks import sketch


@given(st.integers(1, 200))
def test_the_first_and_the_last_layer_are_sampled_and_some_between(layers: int) -> None:
    found = sampled_layers(layers)
    assert found[0] == 0
    assert found[-1] == layers - 1
    assert len(found) == min(layers, MAX_LAYERS)
    assert (np.diff(found) > 0).all()
    assert np.diff(found).max(initial=0) <= -(-layers // MAX_LAYERS) + 1


@given(st.integers(0, 200), st.integers(RUNS, 10**9))
def test_runs_lie_in_the_weight_and_do_not_overlap(layer: int, numbers: int) -> None:
    starts, length = sampled_offsets(layer, numbers)
    assert len(starts) == RUNS
    assert length == min(RUN_LENGTH, numbers // RUNS)
    assert starts[0] >= 0
    assert (np.diff(starts) >= length).all()
    assert starts[-1] + length <= numbers


def test_layers_are_sampled_in_different_places() -> None:
    places = {tuple(sampled_offsets(layer, 4096 * 4096)[0].tolist()) for layer in range(80)}
    assert len(places) == 80


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.ones((2, 12), dtype=np.float16)}, "no runs"),
        ({"values": np.ones((2, 3, 0), dtype=np.float16)}, "no runs"),
        ({"values": np.ones((2, 2, 4), dtype=np.float16)}, "differ in number"),
        ({"layers": np.array([0], dtype=np.int32)}, "differ in number"),
        ({"layers": np.array([2, 0], dtype=np.int32)}, "out of order"),
        ({"layers": np.array([2, 2], dtype=np.int32)}, "out of order"),
        ({"layers": np.array([-1, 2], dtype=np.int32)}, "out of order"),
        ({"offsets": np.full((2, 3), -1)}, "out of order"),
        ({"values": np.full((2, 3, 4), np.nan, dtype=np.float16)}, "no weights are"),
        ({"values": np.zeros((2, 3, 4), dtype=np.float16)}, "no weights are"),
    ],
)
def test_what_is_no_sketch_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(LockValidationError, match=message):
        sketch(**changes)


def test_a_sketch_cannot_be_changed() -> None:
    values = sketch().values.copy()
    kept = KinshipSketch(sketch().layers, sketch().offsets, values)
    values[:] = 0
    assert kept.values.tobytes() == sketch().values.tobytes()
    with pytest.raises(ValueError, match="WRITEABLE"):
        kept.values.flags.writeable = True


def test_a_model_is_as_alike_to_itself_as_can_be_and_scale_does_not_matter() -> None:
    values = sketch().values.astype(np.float64)
    assert cosine(sketch(), values) == pytest.approx(1.0)
    assert cosine(sketch(), 3.0 * values) == pytest.approx(1.0)
    assert cosine(sketch(), -values) == pytest.approx(-1.0)


def test_strangers_and_nothing_are_not_alike() -> None:
    values = np.random.default_rng(0).standard_normal(sketch().values.shape)
    assert abs(cosine(sketch(), values)) < 0.6
    assert cosine(sketch(), np.zeros(sketch().values.shape)) == 0.0
