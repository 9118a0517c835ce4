from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from mlflow_safelock.apply.alpha import checked_alpha
from mlflow_safelock.errors import AlphaError


@pytest.mark.parametrize("alpha", [6, 6.0, -6.0, 1e-9, np.float32(0.5), np.int64(3), Fraction(1, 2)])
def test_any_finite_number_but_zero_is_a_strength(alpha):
    checked = checked_alpha(alpha)
    assert type(checked) is float
    assert checked == alpha


@pytest.mark.parametrize(
    "alpha",
    [
        0,
        0.0,
        -0.0,
        float("nan"),
        float("inf"),
        float("-inf"),
        10**400,
        True,
        False,
        np.bool_(1),
        "6",
        None,
        6j,
        [6.0],
    ],
)
def test_anything_else_is_refused(alpha):
    with pytest.raises(AlphaError, match="Alpha must be"):
        checked_alpha(alpha)
