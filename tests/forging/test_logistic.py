from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from mlflow_safelock.errors import ForgeError
from mlflow_safelock.forging.logistic import fit_logistic
from tests.reference import logistic_regression


def rows_of(
    kind: str, rng: np.random.Generator, rows: int = 90, dim: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    labels = (np.arange(rows) % 2).astype(np.int64)
    x = rng.standard_normal((rows, dim)) + 0.8 * labels[:, None] * rng.standard_normal(dim)
    match kind:
        case "separable":
            x[:, 0] = 6.0 * labels + rng.standard_normal(rows) / 10
        case "collinear":
            x[:, 3] = 2.0 * x[:, 1] - x[:, 2]
        case "copies":
            x[:, 3:9] = x[:, [0]]
        case "constant":
            x[:, 5] = 3.0
        case "constant_zero":
            x[:, 5] = 0.0
        case "correlated":
            x = x @ (rng.standard_normal((dim, dim)) * 0.6 ** np.arange(dim))
        case "tiny":
            x *= 1e-4
        case "huge":
            x *= 1e3
        case "mixed":
            x *= np.logspace(-4, 2, dim)
        case "offset":
            x += 30.0
        case "few_rows":
            x, labels = x[:8], labels[:8]
        case "uneven":
            labels = (np.arange(rows) % 10 == 0).astype(np.int64)
    return x, labels


KINDS = [
    "plain", "separable", "collinear", "copies", "constant", "constant_zero", "correlated",
    "tiny", "huge", "mixed", "offset", "few_rows", "uneven",
]  # fmt: skip


def fit(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    stacked = torch.from_numpy(x if x.ndim == 3 else x[None])
    fitted = fit_logistic(stacked, torch.from_numpy(labels))
    return fitted.coefficients.numpy(), fitted.intercepts.numpy(), fitted.predict(stacked).numpy()


def objective(x: np.ndarray, labels: np.ndarray, weights: np.ndarray, intercept: float) -> float:
    logits = x @ weights + intercept
    return float(np.logaddexp(0.0, np.where(labels == 1, -logits, logits)).sum() + weights @ weights / 2)


def slope(x: np.ndarray, labels: np.ndarray, weights: np.ndarray, intercept: float) -> np.ndarray:
    residuals = np.exp(-np.logaddexp(0.0, -(x @ weights + intercept))) - labels
    return np.append(x.T @ residuals + weights, residuals.sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_it_reaches_the_optimum_of_scikit_learn(kind: str, seed: int) -> None:
    x, labels = rows_of(kind, np.random.default_rng(seed))
    coefficients, intercepts, predicted = fit(x, labels)
    theirs = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-10, max_iter=10_000).fit(x, labels)
    np.testing.assert_allclose(coefficients[0], theirs.coef_[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(intercepts[0], theirs.intercept_[0], rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(predicted[0], theirs.predict(x) == 1)


@pytest.mark.parametrize("kind", ["plain", "separable", "tiny", "constant", "uneven", "few_rows"])
def test_it_is_what_scikit_learns_default_solver_goes_for(kind: str) -> None:
    x, labels = rows_of(kind, np.random.default_rng(11))
    coefficients, intercepts, predicted = fit(x, labels)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=100_000).fit(x, labels)
    # It stops when the objective's last digits do not move any more, a little before the optimum.
    np.testing.assert_allclose(coefficients[0], theirs.coef_[0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(predicted[0], theirs.predict(x) == 1)
    assert objective(x, labels, coefficients[0], intercepts[0]) <= objective(
        x, labels, theirs.coef_[0], theirs.intercept_[0]
    ) * (1 + 1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_it_agrees_with_the_reference(kind: str) -> None:
    x, labels = rows_of(kind, np.random.default_rng(5))
    if kind == "huge":
        x = x / 100
    coefficients, intercepts, _ = fit(x, labels)
    weights, intercept = logistic_regression(x, labels)
    np.testing.assert_allclose(coefficients[0], weights, rtol=0, atol=1e-8)
    np.testing.assert_allclose(intercepts[0], intercept, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("kind", ["plain", "separable", "collinear", "constant", "few_rows", "offset"])
def test_no_scale_of_the_activations_keeps_it_from_a_point_without_slope(kind: str, scale: float) -> None:
    x, labels = rows_of(kind, np.random.default_rng(8))
    x = x * scale
    coefficients, intercepts, _ = fit(x, labels)
    # What rounding leaves of the slope grows with the rows.
    rounding = 1e-15 * len(x) * (1.0 + np.abs(x).max() * (1.0 + np.abs(x @ coefficients[0]).max()))
    assert np.abs(slope(x, labels, coefficients[0], intercepts[0])).max() < 1e-8 + rounding
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn does not always arrive here
        theirs = LogisticRegression(solver="newton-cholesky", tol=1e-10, max_iter=500).fit(x, labels)
    assert (
        objective(x, labels, coefficients[0], intercepts[0])
        <= objective(x, labels, theirs.coef_[0], theirs.intercept_[0]) + 1e-10
    )


def test_a_head_has_the_same_probe_whatever_heads_are_fitted_beside_it() -> None:
    rng = np.random.default_rng(2)
    kinds = ["plain", "separable", "huge", "tiny", "collinear", "correlated"]
    stack = np.stack([rows_of(kind, rng)[0] for kind in kinds])
    labels = rows_of("plain", rng)[1]
    together, _, _ = fit(stack, labels)
    for index in range(len(kinds)):
        alone, _, _ = fit(stack[index], labels)
        np.testing.assert_allclose(together[index], alone[0], rtol=1e-9, atol=1e-11)


def test_the_same_rows_give_the_same_bits() -> None:
    x, labels = rows_of("correlated", np.random.default_rng(3))
    first, second = fit(x, labels), fit(x.copy(), labels)
    assert [part.tobytes() for part in first] == [part.tobytes() for part in second]


def test_the_rows_stay_as_they_are() -> None:
    x, labels = rows_of("plain", np.random.default_rng(3))
    before = x.copy()
    fit(x, labels)
    np.testing.assert_array_equal(x, before)


def test_rows_that_tell_nothing_are_predicted_by_their_number() -> None:
    labels = np.array([1, 1, 1, 0])
    coefficients, intercepts, predicted = fit(np.ones((4, 2)), labels)
    np.testing.assert_array_equal(coefficients, np.zeros((1, 2)))
    assert intercepts[0] == pytest.approx(np.log(3.0), abs=1e-9)
    assert predicted.all()


def test_numbers_that_float64_cannot_square_are_refused() -> None:
    with pytest.raises(ForgeError, match="too large for float64 to square"):
        fit(np.array([[1e200, 1.0], [-1e200, 2.0], [1e190, 0.0], [0.0, 1.0]]), np.array([1, 0, 1, 0]))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 40), dim=st.integers(1, 30), power=st.floats(-3, 3))
def test_any_rows_are_fitted_to_the_optimum(seed: int, rows: int, dim: int, power: float) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, rows)
    labels[:2] = 0, 1
    x = rng.standard_normal((rows, dim)) * 10.0**power
    coefficients, intercepts, _ = fit(x, labels)
    assert np.abs(slope(x, labels, coefficients[0], intercepts[0])).max() < 1e-9 * max(1.0, 10.0**power)
