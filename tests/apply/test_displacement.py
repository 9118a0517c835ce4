from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mlflow_safelock.apply import displacement
from mlflow_safelock.apply.displacement import (
    StoredBiases,
    Workspace,
    check_kept,
    displacements,
    head_weight_of,
    input_displacement,
    output_bias,
    stored_bias,
)
from mlflow_safelock.errors import AlphaError
from mlflow_safelock.lock import AttentionGeometry, LockedHead, SafetyLock
from tests.models import random_lock

geometries = st.builds(
    AttentionGeometry,
    layers=st.integers(1, 4),
    heads=st.integers(1, 6),
    head_dim=st.integers(1, 9),
    hidden=st.integers(1, 40),
)
alphas = st.floats(-20, 20).filter(lambda alpha: abs(alpha) > 1e-6)


def plain_biases(lock: SafetyLock, alpha: float, weights: np.ndarray) -> np.ndarray:
    """``W_o v`` of every layer, everything written out in float64; weights are [layers, hidden, width]."""
    geometry = lock.geometry
    full = np.zeros((geometry.layers, geometry.heads, geometry.head_dim))
    for locked in lock.heads:
        full[locked.layer, locked.head] = alpha * locked.std * locked.direction.astype(np.float64)
    return np.einsum("lok,lk->lo", weights.astype(np.float64), full.reshape(geometry.layers, -1))


def computed_biases(lock: SafetyLock, alpha: float, weights: torch.Tensor, layout: str) -> np.ndarray:
    found = np.zeros(weights.shape[:2])
    for push in displacements(lock, alpha):
        weight = weights[push.layer] if layout == "linear" else weights[push.layer].T.contiguous()
        head_weight = head_weight_of(weight, lock.geometry.head_dim, layout)
        found[push.layer] = output_bias(head_weight, push).numpy()
    return found


@settings(max_examples=60, deadline=None)
@given(
    geometry=geometries,
    alpha=alphas,
    seed=st.integers(0, 9),
    layout=st.sampled_from(["linear", "conv1d"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_bias_is_the_plain_matrix_product_but_for_the_rounding_of_a_sum(geometry, alpha, seed, layout, dtype):
    lock = random_lock(geometry, heads=min(5, geometry.layers * geometry.heads), seed=seed)
    rng = np.random.default_rng(seed)
    shape = (geometry.layers, geometry.hidden, geometry.heads * geometry.head_dim)
    stored = torch.tensor(rng.normal(size=shape)).to(dtype)
    weights = stored.double().numpy()
    expected = plain_biases(lock, alpha, weights)
    found = computed_biases(lock, alpha, stored, layout)
    # A sum of n products errs by at most n + 1 unit roundoffs of the sum of their sizes.
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    sizes = plain_biases(_with_positive_directions(lock), abs(alpha), np.abs(weights))
    assert (np.abs(found - expected) <= (geometry.head_dim + 6) * unit * sizes).all()


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float16, 5e-7), (torch.bfloat16, 5e-7), (torch.float32, 5e-7), (torch.float64, 1e-14)],
)
def test_narrow_weights_are_summed_in_a_wider_dtype(dtype, error):
    geometry = AttentionGeometry(layers=1, heads=16, head_dim=128, hidden=64)
    lock = random_lock(geometry, heads=16)
    weights = torch.randn(1, 64, 2048, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = plain_biases(lock, 6.0, weights.double().numpy())
    found = computed_biases(lock, 6.0, weights, "linear")
    assert np.linalg.norm(found - expected) <= error * np.linalg.norm(expected)


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_columns_of_other_heads_are_never_read(layout):
    geometry = AttentionGeometry(layers=1, heads=4, head_dim=3, hidden=5)
    lock = random_lock(geometry, heads=2)
    (push,) = displacements(lock, 1.0)
    weight = torch.full((1, 5, 12), torch.nan)
    for head in push.heads:
        weight[:, :, head * 3 : head * 3 + 3] = 1.0
    assert np.isfinite(computed_biases(lock, 1.0, weight, layout)).all()


@settings(max_examples=30, deadline=None)
@given(geometry=geometries, alpha=alphas)
def test_the_full_displacement_is_zero_but_for_locked_heads_and_has_their_size(geometry, alpha):
    lock = random_lock(geometry, heads=min(4, geometry.layers * geometry.heads))
    for push in displacements(lock, alpha):
        full = input_displacement(push, geometry).view(geometry.heads, geometry.head_dim)
        for head in range(geometry.heads):
            locked = next((item for item in lock.heads_of_layer(push.layer) if item.head == head), None)
            size = 0.0 if locked is None else abs(alpha) * locked.std
            assert full[head].norm().item() == pytest.approx(size, rel=1e-5)


def test_displacement_is_linear_in_alpha_and_turns_with_its_sign():
    geometry = AttentionGeometry(layers=2, heads=4, head_dim=8, hidden=16)
    lock = random_lock(geometry)
    for plus, minus, double in zip(
        displacements(lock, 3.0), displacements(lock, -3.0), displacements(lock, 6.0), strict=True
    ):
        assert torch.equal(plus.values, -minus.values)
        assert torch.equal(2 * plus.values, double.values)


@pytest.mark.parametrize("alpha", [1e-320, 1e-45, -1e-300, 1e39, -1e300])
def test_a_push_that_float32_cannot_hold_is_refused(alpha):
    lock = random_lock(AttentionGeometry(layers=2, heads=4, head_dim=8, hidden=16))
    with pytest.raises(AlphaError, match=r"push on head \d of layer \d is beyond .* float32") as info:
        displacements(lock, alpha)
    assert info.value.next_step


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 1e-9), (torch.float16, 1e-7), (torch.bfloat16, 1e-42)]
)
def test_a_bias_that_is_lost_in_its_dtype_is_refused(dtype, size):
    bias = size * torch.linspace(-1, 1, 48, dtype=torch.float64)
    with pytest.raises(AlphaError, match=rf"At alpha 1e-07 the bias of layer 3 is lost .* {dtype}") as info:
        stored_bias(bias, None, dtype, layer=3, alpha=1e-7)
    assert "larger alpha" in info.value.next_step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [8, 16384])
def test_a_bias_with_some_numbers_too_small_for_its_dtype_is_kept(dtype, hidden):
    generator = torch.Generator().manual_seed(0)
    bias = 0.002 * torch.randn(hidden, generator=generator, dtype=torch.float64)
    bias[::2] *= 1e-12
    assert torch.equal(stored_bias(bias, None, dtype, layer=0, alpha=1.0), bias.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_push_that_is_lost_beside_the_models_own_bias_is_refused(dtype):
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(4096, generator=generator).to(dtype)
    push = torch.randn(4096, generator=generator, dtype=torch.float64)
    step = torch.finfo(dtype).eps
    kept = stored_bias(step * push, own, dtype, layer=0, alpha=1.0).double() - own.double()
    assert torch.nn.functional.cosine_similarity(kept, push, dim=0) > 0.9
    with pytest.raises(AlphaError, match=f"the bias of layer 3 is lost in the rounding to {dtype}"):
        stored_bias(step / 8 * push, own, dtype, layer=3, alpha=1.0)


@pytest.mark.parametrize(
    ("dtype", "size", "fault"),
    [
        (torch.float16, 1e-8, "lost in the rounding"),
        (torch.bfloat16, 1e-41, "lost in the rounding"),
        (torch.float16, 1e5, "beyond what"),
        (torch.float16, 1e-3, None),
        (torch.bfloat16, 1e5, None),
    ],
)
def test_an_input_is_pushed_in_a_dtype_that_holds_the_push_or_not_at_all(dtype, size, fault):
    push = size * torch.linspace(-1, 1, 48, dtype=torch.float64)
    if fault is None:
        check_kept(push, dtype, layer=3, alpha=0.1)
    else:
        with pytest.raises(AlphaError, match=f"At alpha 0.1 the push on layer 3 is {fault} .*{dtype}"):
            check_kept(push, dtype, layer=3, alpha=0.1)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["golden_a", "golden_b"])
def test_biases_agree_with_the_reference_numbers(shared: Path, name):
    golden = load_file(shared / "golden" / f"{name}.safetensors")
    layers, hidden, width = golden["o_proj"].shape
    head_dim = golden["directions"].shape[1]
    geometry = AttentionGeometry(layers=layers, heads=width // head_dim, head_dim=head_dim, hidden=hidden)
    rows = zip(golden["top_heads"], golden["directions"], golden["stds"], strict=True)
    lock = SafetyLock(
        tuple(
            LockedHead(int(at[0]), int(at[1]), row.astype(np.float32), float(std)) for at, row, std in rows
        ),
        random_lock(geometry).metadata,
    )
    found = computed_biases(lock, 6.0, torch.tensor(golden["o_proj"]), "linear")
    expected = golden["bias_alpha6"]
    locked = list(lock.layers)
    errors = np.linalg.norm(found - expected, axis=1)[locked] / np.linalg.norm(expected, axis=1)[locked]
    assert errors.max() < 1e-5
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert not expected[[layer for layer in range(layers) if layer not in locked]].any()


def _with_positive_directions(lock: SafetyLock) -> SafetyLock:
    heads = (LockedHead(item.layer, item.head, np.abs(item.direction), item.std) for item in lock.heads)
    return SafetyLock(tuple(heads), lock.metadata)


@pytest.mark.parametrize("numbers_at_once", [1, 8 * 48 * 3, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_products_at_once_are_those_one_by_one(dtype, numbers_at_once, monkeypatch):
    """The way of a GPU, in several steps and in one, on the CPU."""
    monkeypatch.setattr(displacement, "_NUMBERS_AT_ONCE", numbers_at_once)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(48, 32, generator=generator).to(dtype) for _ in range(3)]
    columns = [weight[:, 8 * head : 8 * head + 8] for weight, head in zip(weights, (0, 3, 1), strict=True)]
    columns += [weights[0][:, 8:16], weights[1][:, :8]]
    values = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    expected = torch.stack([part.double() @ value for part, value in zip(columns, values, strict=True)])
    expected = torch.stack([expected[0], expected[1:4].sum(dim=0), expected[4]])
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    for multiply in (displacement._at_once, partial(displacement._one_by_one, workspace=Workspace())):
        found = multiply(columns, values.to(accumulator), [1, 3, 1])
        assert found.dtype == torch.float64
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_of_several_layers_the_one_whose_bias_is_lost_is_named():
    pushes = torch.ones(3, 8, dtype=torch.float64)
    pushes[1] = 1e-300
    with pytest.raises(AlphaError, match="the bias of layer 7"):
        StoredBiases(pushes, [None, None, None], torch.bfloat16).check([2, 7, 9], alpha=1.0)
