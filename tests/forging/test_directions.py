from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mlflow_safelock.errors import ForgeError
from mlflow_safelock.forging.directions import locked_head
from tests import reference


@pytest.mark.parametrize("seed", range(3))
def test_direction_and_std_are_those_of_the_reference(seed: int) -> None:
    sample = reference.sample(seed)
    for layer in range(3):
        for head in range(5):
            rows = sample.activations[:, layer, head]
            found = locked_head(torch.from_numpy(rows), torch.from_numpy(sample.labels), layer, head)
            direction, std = reference.direction_and_std(rows, sample.labels)
            np.testing.assert_allclose(found.direction, direction, rtol=0, atol=1e-6)
            assert found.std == pytest.approx(std, abs=1e-9)
            assert (found.layer, found.head) == (layer, head)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["golden_a", "golden_b"])
def test_direction_and_std_are_the_golden_ones(shared: Path, name: str) -> None:
    golden = load_file(shared / "golden" / f"{name}.safetensors")
    labels = torch.from_numpy(golden["labels"])
    for (layer, head), direction, std in zip(
        golden["top_heads"].tolist(), golden["directions"], golden["stds"], strict=True
    ):
        found = locked_head(torch.from_numpy(golden["activations"][:, layer, head]), labels, layer, head)
        np.testing.assert_allclose(found.direction, direction, rtol=0, atol=1e-6)
        assert found.std == pytest.approx(std, abs=1e-6)


def test_it_points_from_unsafe_to_safe() -> None:
    rows = torch.tensor([[5.0, 1.0], [7.0, 1.0], [1.0, 1.0], [-1.0, 1.0]])
    found = locked_head(rows, torch.tensor([1, 1, 0, 0]), 2, 3)
    assert found.direction.tolist() == [1.0, 0.0]
    # 5, 7, 1 and -1 around 3: the population's standard deviation.
    assert found.std == pytest.approx(10.0**0.5)


def test_half_precision_rows_are_summed_in_float64() -> None:
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.standard_normal((4000, 4)) + 300.0).half()
    labels = torch.tensor([1, 0] * 2000)
    direction, std = reference.direction_and_std(rows.double().numpy(), labels.numpy())
    found = locked_head(rows, labels, 0, 0)
    np.testing.assert_allclose(found.direction, direction, rtol=0, atol=1e-6)
    assert found.std == pytest.approx(std, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-12, 1e12])
def test_a_head_that_puts_out_the_same_for_both_has_no_direction(value: float) -> None:
    rows = torch.full((7, 3), value, dtype=torch.float64)
    with pytest.raises(ForgeError, match="Head 5 of layer 4 puts out the same for safe and for unsafe"):
        locked_head(rows, torch.tensor([1, 1, 1, 0, 0, 0, 0]), 4, 5)


def test_a_small_difference_is_a_difference() -> None:
    rows = torch.tensor([[1e-6, 1.0], [0.0, 1.0]], dtype=torch.float64).repeat(5, 1)
    found = locked_head(rows, torch.tensor([1, 0] * 5), 0, 0)
    assert found.direction.tolist() == [1.0, 0.0]
    assert found.std == pytest.approx(5e-7)
