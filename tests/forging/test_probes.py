from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mlflow_safelock.errors import ForgeError
from mlflow_safelock.forging import ProbeScores, RowSplit, given_split, score_heads, split_by_row
from mlflow_safelock.forging import probes as probes_module
from tests import reference


def scored(sample: reference.Sample) -> ProbeScores:
    split = given_split(sample.train_rows, sample.val_rows, len(sample.labels))
    return score_heads(torch.from_numpy(sample.activations), torch.from_numpy(sample.labels), split)


@pytest.mark.parametrize("seed", range(4))
def test_scores_and_ranking_are_those_of_the_reference(seed: int) -> None:
    sample = reference.sample(seed)
    scores = scored(sample)
    expected = reference.probe_scores(sample.activations, sample.labels, sample.train_rows, sample.val_rows)
    np.testing.assert_allclose(scores.scores, expected, rtol=0, atol=1e-12)
    assert list(scores.best_heads(15)) == reference.top_heads(expected, 15)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["golden_a", "golden_b"])
def test_scores_and_ranking_are_the_golden_ones(shared: Path, name: str) -> None:
    golden = load_file(shared / "golden" / f"{name}.safetensors")
    split = given_split(golden["train_rows"], golden["val_rows"], len(golden["labels"]))
    scores = score_heads(torch.from_numpy(golden["activations"]), torch.from_numpy(golden["labels"]), split)
    one_row = 0.5 / min(len(split.train), len(split.validation))
    assert np.abs(scores.scores - golden["scores"]).max() <= one_row
    assert list(scores.best_heads(len(golden["top_heads"]))) == list(map(tuple, golden["top_heads"].tolist()))


def test_counts_are_of_rows() -> None:
    sample = reference.sample(1)
    scores = scored(sample)
    for correct, rows in (
        (scores.train_correct, sample.train_rows),
        (scores.validation_correct, sample.val_rows),
    ):
        assert correct.dtype == np.int64
        assert correct.shape == sample.activations.shape[1:3]
        assert len(rows) / 2 < correct.max() <= len(rows)


def test_ties_are_ties_and_go_to_the_lower_layer_then_the_lower_head() -> None:
    # 7/9 + 3/5 and 4/9 + 14/15 are the same, and no sum of floats says so for certain.
    train = np.array([[35, 20, 35], [20, 0, 45], [35, 20, 35]])
    validation = np.array([[9, 14, 9], [14, 0, 15], [9, 14, 9]])
    scores = ProbeScores(train, validation, 45, 15)
    order = scores.best_heads(9)
    assert order == ((1, 2), (0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2), (1, 1))
    assert len({float(scores.scores[place]) for place in order[1:8]}) == 1


def test_equal_heads_tie() -> None:
    sample = reference.sample(2, layers=1, heads=1)
    copies = np.tile(sample.activations, (1, 3, 4, 1))
    scores = scored(
        reference.Sample(copies, sample.labels, sample.train_rows, sample.val_rows, sample.o_proj)
    )
    assert len(np.unique(scores.train_correct)) == len(np.unique(scores.validation_correct)) == 1
    assert scores.best_heads(5) == ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_floating_dtype_is_probed_as_the_numbers_it_holds(dtype: torch.dtype) -> None:
    sample = reference.sample(3)
    held = torch.from_numpy(sample.activations).to(dtype)
    split = given_split(sample.train_rows, sample.val_rows, len(sample.labels))
    scores = score_heads(held, torch.from_numpy(sample.labels), split)
    expected = reference.probe_scores(
        held.double().numpy(), sample.labels, sample.train_rows, sample.val_rows
    )
    np.testing.assert_allclose(scores.scores, expected, rtol=0, atol=1e-12)


def test_the_size_of_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = reference.sample(4)
    whole = scored(sample)
    monkeypatch.setitem(probes_module.CHUNK_VALUES, "cpu", 4 * sample.activations[:, 0, 0].size)
    assert scored(sample).best_heads(15) == whole.best_heads(15)
    monkeypatch.setitem(probes_module.CHUNK_VALUES, "cpu", 1)
    one_by_one = scored(sample)
    np.testing.assert_array_equal(one_by_one.train_correct, whole.train_correct)
    np.testing.assert_array_equal(one_by_one.validation_correct, whole.validation_correct)


@pytest.mark.parametrize(("side", "name"), [("train", "train"), ("validation", "validation")])
def test_a_side_of_one_kind_is_refused(side: str, name: str) -> None:
    sample = reference.sample(0)
    safe, unsafe = np.flatnonzero(sample.labels == 1), np.flatnonzero(sample.labels == 0)
    one, mixed = safe[:20], np.sort(np.r_[safe[20:], unsafe])
    train, validation = (one, mixed) if side == "train" else (mixed, one)
    split = RowSplit(train, validation, "given", 0.5, None)
    with pytest.raises(ForgeError, match=f"The {name} rows hold answers of one kind only"):
        score_heads(torch.from_numpy(sample.activations), torch.from_numpy(sample.labels), split)


def test_activations_stay_as_they_are() -> None:
    sample = reference.sample(0)
    before = sample.activations.copy()
    scored(sample)
    np.testing.assert_array_equal(sample.activations, before)


def test_probing_at_chance_scores_chance() -> None:
    rng = np.random.default_rng(0)
    activations = torch.from_numpy(rng.standard_normal((400, 2, 6, 4)))
    labels = torch.from_numpy(np.tile([1, 0], 200))
    scores = score_heads(activations, labels, split_by_row(400, 0.6, 0)).scores
    assert scores.min() > 0.45
    assert scores.max() < 0.62
