"""The strength of a lock."""

from __future__ import annotations

import math
from numbers import Real

from mlflow_safelock.errors import AlphaError


def checked_alpha(alpha: object) -> float:
    """Return ``alpha`` as a float, after checking that it is a strength.

    A negative alpha is one: it pushes towards unsafe answers, which shows what a lock does. Where negative
    alphas must not be used, the policy of a gate says so.

    Raises:
        AlphaError: It is not a number, or zero, NaN or infinite.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise AlphaError(f"Alpha must be a number, not {alpha!r}.", next_step="The method's default is 6.0.")
    try:
        value = float(alpha)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value) or value == 0.0:
        raise AlphaError(
            f"Alpha must be finite and not zero, and it is {value!r}.",
            next_step="The method's default is 6.0; to have no lock, remove it.",
        )
    return value
