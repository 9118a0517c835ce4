"""The reference itself, against the reference data beside the checkout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import reference


@pytest.mark.shared
@pytest.mark.parametrize("name", ["golden_a", "golden_b"])
def test_the_reference_says_what_the_golden_numbers_say(shared: Path, name: str) -> None:
    golden = load_file(shared / "golden" / f"{name}.safetensors")
    activations, labels = golden["activations"], golden["labels"]
    scores = reference.probe_scores(activations, labels, golden["train_rows"], golden["val_rows"])
    np.testing.assert_allclose(scores, golden["scores"], rtol=0, atol=1e-12)
    heads = reference.top_heads(scores, len(golden["top_heads"]))
    assert heads == [tuple(place) for place in golden["top_heads"].tolist()]
    found = {
        (layer, head): reference.direction_and_std(activations[:, layer, head], labels)
        for layer, head in heads
    }
    np.testing.assert_allclose(
        [direction for direction, _ in found.values()], golden["directions"], atol=1e-12
    )
    np.testing.assert_allclose([std for _, std in found.values()], golden["stds"], atol=1e-12)
    bias = reference.bias(golden["o_proj"], found, activations.shape[3], alpha=6.0)
    np.testing.assert_allclose(bias, golden["bias_alpha6"], rtol=1e-9, atol=1e-12)


def test_made_up_heads_know_the_difference_more_or_less_well() -> None:
    sample = reference.sample(0)
    scores = reference.probe_scores(sample.activations, sample.labels, sample.train_rows, sample.val_rows)
    assert len(np.unique(scores)) > 10
    assert scores.max() > 0.85
    assert scores.min() < 0.7
