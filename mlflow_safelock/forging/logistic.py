"""Many small logistic regressions at once: the arithmetic behind the probes (METHOD, forge step 4).

For every head the same problem is solved that scikit-learn's ``LogisticRegression(C=1)`` states: find ``w``
and ``b`` that minimise

    sum_i [ log(1 + exp(z_i)) - y_i * z_i ] + |w|^2 / 2        with  z_i = x_i . w + b,  b not penalised.

The method is Newton's, on a stack of heads. It is quick because the way to the neighbourhood of the optimum,
and what only steers, the Hessian, are in float32, and because a Hessian is kept for as long as it steers
well; it is exact because the rest of the way, with objective, gradient and solution, is in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from mlflow_safelock.errors import ForgeError

DECREMENT_TOLERANCE = 1e-20
"""A head is done once its squared Newton decrement is below this. As the penalty alone makes the Hessian at
least the identity, its coefficients are then within about 1e-10 of the optimum (Euclidean)."""

ACCEPTED_DECREMENT = 1e-14
"""What is accepted where rounding keeps a head from getting further: coefficients within about 1e-7."""

APPROACH_DECREMENT = 1e-7
"""Squared decrement down to which everything is in float32, whose rounding is felt from about 1e-10."""

APPROACH_ITERATIONS = 8
"""How many iterations are in float32 at most; the heads that have farther to go do so in float64."""

MAX_ITERATIONS = 200

FLOAT32_ITERATIONS = 15
"""A head that takes more iterations than this has a Hessian that float32 does not describe well enough."""

KEEP_FACTOR_BELOW = 0.1
"""Squared decrement below which a Hessian may serve another iteration, relative to what is left of the
objective (or to one, where more is left)."""

FULL_STEP_BELOW = 0.01
"""Squared decrement below which the full Newton step is as good as any, relative to the same."""

STEP_LENGTHS = (1.0, 1.5, 2.0, 3.5, 6.0, 0.5, 0.125, 0.015625, 0.001, 0.0)
"""What is tried along a Newton direction before that. Lengths above one, because on (nearly) separable rows
the margin has far to grow, and a plain Newton step adds only about one to it."""

RIDGES = {torch.float32: (1e-6, 1e-3), torch.float64: (1e-13, 1e-9)}
"""What is added to a Hessian's diagonal, relative to its largest entry, so that rounding does not make it
indefinite: the first, or the second where the first is not enough."""

CHECK_ACTIVATIONS = "Look for activations that are many orders of magnitude larger than the others."


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """The optimum of every head.

    Attributes:
        coefficients: float64 ``[heads, dim]``.
        intercepts: float64 ``[heads]``.
    """

    coefficients: torch.Tensor
    intercepts: torch.Tensor

    def predict(self, rows: torch.Tensor) -> torch.Tensor:
        """Which rows lie on the positive side: bool ``[heads, rows]`` for ``[heads, rows, dim]``.

        Rows of a dtype below float64 are multiplied in float32; those too close to the boundary for that,
        once more in float64. So the answer is that of float64 for every dtype.
        """
        if rows.dtype == torch.float64:
            return _dot_rows(self.coefficients, rows) + self.intercepts[:, None] > 0.0
        single = rows.float()
        coefficients, intercepts = self.coefficients.float(), self.intercepts.float()[:, None]
        logits = _dot_rows(coefficients, single) + intercepts
        sizes = (
            torch.linalg.vector_norm(single, dim=2) * torch.linalg.vector_norm(coefficients, dim=1)[:, None]
        )
        rounding = torch.finfo(torch.float32).eps * (rows.shape[2] + 4) * (sizes + intercepts.abs())
        positive = logits > 0.0
        heads, close = (~(logits.abs() > rounding)).nonzero(as_tuple=True)  # NaN and infinity are close, too
        exact = (rows[heads, close].double() * self.coefficients[heads]).sum(dim=1) + self.intercepts[heads]
        positive[heads, close] = exact > 0.0
        return positive


def fit_logistic(rows: torch.Tensor, labels: torch.Tensor) -> LogisticFit:
    """Fit one logistic regression per head.

    Takes about five times the memory of ``rows`` at its peak.

    Args:
        rows: Finite float64 ``[heads, rows, dim]`` on any device.
        labels: ``[rows]``, 1 or 0 (or bool), the same for all heads, holding both values.

    Returns:
        The optimum of every head, on the device of ``rows``. The same input gives the same bits.

    Raises:
        ForgeError: A head's optimum could not be reached.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[[-2.0], [-1.0], [1.0], [2.0]]], dtype=torch.float64)
        >>> fit = fit_logistic(rows, torch.tensor([0, 0, 1, 1]))
        >>> fit.predict(rows).tolist()
        [[False, False, True, True]]
    """
    mean = rows.mean(dim=1)
    centred = rows - mean[:, None]
    # Columns are measured by their share of the Hessian at the start, which gets a unit diagonal; centring
    # takes the intercept out of their way. Both change the coordinates only, as the penalty goes along.
    unit = (torch.linalg.vector_norm(centred, dim=1).square() / 4.0 + 1.0).sqrt()
    if not torch.isfinite(unit).all():
        raise ForgeError(
            "A probe cannot be fitted, because its activations are too large for float64 to square.",
            next_step=CHECK_ACTIVATIONS,
        )
    problems = _Problems(
        rows=centred.div_(unit[:, None]),
        single=centred.float(),
        signs=2.0 * labels.to(rows.dtype) - 1.0,
        penalty=unit.square().reciprocal(),
        bias=2.0 / len(labels) ** 0.5,
    )
    solution = _minimise(problems, _approach(problems.in_float32()))
    coefficients = solution[:, :-1] / unit
    intercepts = solution[:, -1] * problems.bias - (coefficients * mean).sum(dim=1)
    return LogisticFit(coefficients, intercepts)


@dataclass(frozen=True, eq=False)
class _Problems:
    """Heads still to be solved, in coordinates that suit the arithmetic; ``[heads, dim + 1]`` is a point.

    Attributes:
        rows: float64 or float32 ``[heads, rows, dim]``; what follows has the same dtype unless it says so.
        single: The same in float32.
        signs: ``[rows]``, 1 or -1. A row's margin is its logit times its sign.
        penalty: ``[heads, dim]``, the penalty's factor for each coordinate.
        bias: What the constant column, the last coordinate's, holds.
    """

    rows: torch.Tensor
    single: torch.Tensor
    signs: torch.Tensor
    penalty: torch.Tensor
    bias: float

    def in_float32(self) -> _Problems:
        return _Problems(self.single, self.single, self.signs.float(), self.penalty.float(), self.bias)

    def only(self, heads: torch.Tensor) -> _Problems:
        return _Problems(self.rows[heads], self.single[heads], self.signs, self.penalty[heads], self.bias)

    def logits(self, points: torch.Tensor) -> torch.Tensor:
        return _dot_rows(points[:, :-1], self.rows) + self.bias * points[:, -1:]

    def doubts(self, logits: torch.Tensor) -> torch.Tensor:
        """The probability of the wrong label. One minus the right one's would lose its digits."""
        return torch.sigmoid(-self.signs * logits)

    def gradient(self, points: torch.Tensor, doubts: torch.Tensor) -> torch.Tensor:
        residuals = -self.signs * doubts
        weights = _combine_rows(residuals, self.rows) + self.penalty * points[:, :-1]
        return torch.cat([weights, self.bias * residuals.sum(dim=1, keepdim=True)], dim=1)

    def hessian(self, heads: torch.Tensor, doubts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        everyone = len(heads) == len(self.rows)
        stored = self.single if dtype == torch.float32 else self.rows
        rows = stored if everyone else stored[heads]
        curvature = (doubts * (1.0 - doubts))[heads].to(dtype)
        dim = rows.shape[2]
        hessian = rows.new_empty(len(rows), dim + 1, dim + 1)
        hessian[:, :dim, :dim] = torch.bmm(rows.transpose(1, 2), rows * curvature[:, :, None])
        hessian[:, dim, :dim] = hessian[:, :dim, dim] = self.bias * _combine_rows(curvature, rows)
        hessian[:, dim, dim] = self.bias**2 * curvature.sum(dim=1)
        hessian.diagonal(dim1=1, dim2=2)[:, :dim] += self.penalty[heads].to(dtype)
        return hessian

    def objective_along(
        self,
        heads: torch.Tensor,
        points: torch.Tensor,
        logits: torch.Tensor,
        steps: torch.Tensor,
        logit_steps: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """The objective ``[len(heads), lengths]`` of some heads after steps of each length."""
        reached = logits[heads, None] + lengths[:, None] * logit_steps[heads, None]
        weights = points[heads, None, :-1] + lengths[:, None] * steps[heads, None, :-1]
        loss = softplus(-self.signs * reached, threshold=40.0).sum(dim=2)
        return loss + 0.5 * (self.penalty[heads, None] * weights.square()).sum(dim=2)


@dataclass(frozen=True, eq=False)
class _State:
    """How far the heads have got; in the dtype of their problems' rows.

    Attributes:
        points: ``[heads, dim + 1]``.
        logits: ``[heads, rows]``, at the points.
        left: ``[heads]``, the objective that is left, or one where that is less.
        steering: What gives the next steps.
    """

    points: torch.Tensor
    logits: torch.Tensor
    left: torch.Tensor
    steering: _Steering

    @classmethod
    def at_zero(cls, problems: _Problems) -> _State:
        heads, rows, dim = problems.rows.shape
        return cls(
            problems.rows.new_zeros(heads, dim + 1),
            problems.rows.new_zeros(heads, rows),
            problems.rows.new_full((heads,), min(1.0, rows * math.log(2.0))),
            _Steering(problems),
        )

    def on(self, problems: _Problems) -> _State:
        """The same points for problems in float64. A point that float32 could not hold becomes zero."""
        known = torch.isfinite(self.points).all(dim=1, keepdim=True)
        points = torch.where(known, self.points, 0.0).to(problems.rows.dtype)
        self.steering.decrement = self.steering.decrement.to(points.dtype)
        return _State(points, problems.logits(points), self.left.to(points.dtype), self.steering)

    def only(self, heads: torch.Tensor) -> _State:
        self.steering.only(heads)
        return _State(self.points[heads], self.logits[heads], self.left[heads], self.steering)

    def advanced(self, problems: _Problems) -> _State:
        """One Newton step further; the steering's ``decrement`` says how long it was."""
        doubts = problems.doubts(self.logits)
        gradient = problems.gradient(self.points, doubts)
        steps, decrement = self.steering.steps(problems, gradient, doubts, self.left)
        logit_steps, left = problems.logits(steps), self.left
        lengths = torch.ones_like(decrement)
        far = (decrement > FULL_STEP_BELOW * left).nonzero()[:, 0]
        if len(far):
            tried = steps.new_tensor(STEP_LENGTHS)
            search = problems.objective_along(far, self.points, self.logits, steps, logit_steps, tried).min(
                dim=1
            )
            lengths[far] = tried[search.indices]
            left = left.index_copy(0, far, search.values.clamp(max=1.0))
        return _State(
            torch.addcmul(self.points, lengths[:, None], steps),
            torch.addcmul(self.logits, lengths[:, None], logit_steps),
            left,
            self.steering,
        )


def _approach(problems: _Problems) -> _State:
    """Into the neighbourhood of the optimum, all in float32, which is half the memory and a fast ``exp``."""
    state = _State.at_zero(problems)
    for _ in range(APPROACH_ITERATIONS):
        state = state.advanced(problems)
        arrived = state.steering.decrement <= APPROACH_DECREMENT
        state.steering.settle(arrived)
        if arrived.all():
            break
    return state


def _minimise(problems: _Problems, start: _State) -> torch.Tensor:
    state = start.on(problems)
    solution = torch.zeros_like(state.points)
    open_heads = torch.arange(len(solution), device=solution.device)
    unsolved = torch.ones_like(open_heads, dtype=torch.bool)
    for iteration in range(MAX_ITERATIONS):
        steering = state.steering
        if iteration == FLOAT32_ITERATIONS:
            steering.use_float64()
        state = state.advanced(problems)
        newly = unsolved[open_heads] & ((steering.decrement <= DECREMENT_TOLERANCE) | steering.exhausted)
        solution[open_heads[newly]] = state.points[newly]
        unsolved[open_heads[newly]] = False
        rest = unsolved[open_heads].nonzero()[:, 0]
        if not len(rest):
            return solution
        # Heads that are done are left behind only when they are many, because that copies the others.
        if 2 * len(rest) <= len(open_heads):
            open_heads, state, problems = open_heads[rest], state.only(rest), problems.only(rest)
        state.steering.settle(~unsolved[open_heads])
    rest = unsolved[open_heads].nonzero()[:, 0]
    if not (state.steering.decrement[rest] <= ACCEPTED_DECREMENT).all():
        raise ForgeError(
            f"The probes of {len(rest)} heads could not be fitted in {MAX_ITERATIONS} iterations.",
            next_step=CHECK_ACTIVATIONS,
        )
    solution[open_heads[rest]] = state.points[rest]
    return solution


class _Steering:
    """Newton's directions, from factorised Hessians that are renewed only when they steer badly."""

    def __init__(self, problems: _Problems) -> None:
        heads, _, dim = problems.single.shape
        self._factors = problems.single.new_zeros(heads, dim + 1, dim + 1)
        self._stale = torch.ones(heads, dtype=torch.bool, device=self._factors.device)
        self.decrement = problems.rows.new_full((heads,), torch.inf)
        self.exhausted = torch.zeros_like(self._stale)

    def settle(self, heads: torch.Tensor) -> None:
        """Renew no factor of these heads (bool ``[heads]``) for the next step, which no longer matters."""
        self._stale &= ~heads

    def use_float64(self) -> None:
        self._factors = self._factors.double()
        self._stale = torch.ones_like(self._stale)

    def only(self, heads: torch.Tensor) -> None:
        self._factors, self._stale = self._factors[heads], self._stale[heads]
        self.decrement, self.exhausted = self.decrement[heads], self.exhausted[heads]

    def steps(
        self, problems: _Problems, gradient: torch.Tensor, doubts: torch.Tensor, left: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The steps, and their squared decrements, that is, about twice what each promises to gain."""
        stale = self._stale.nonzero()[:, 0]
        if len(stale) == len(self._stale):
            self._factors = _factorised(problems.hessian(stale, doubts, self._factors.dtype))
        elif len(stale):
            self._factors[stale] = _factorised(problems.hessian(stale, doubts, self._factors.dtype))
        steps = torch.cholesky_solve(-gradient.to(self._factors.dtype)[:, :, None], self._factors)
        steps = steps[:, :, 0].to(gradient.dtype)
        before, self.decrement = self.decrement, -(gradient * steps).sum(dim=1)
        contracts = self.decrement < before / 4.0
        if self._factors.dtype == torch.float64:
            self.exhausted = self._stale & ~contracts & (self.decrement <= ACCEPTED_DECREMENT)
        self._stale = ~((self._stale | contracts) & (self.decrement < KEEP_FACTOR_BELOW * left))
        return steps, self.decrement


def _factorised(hessians: torch.Tensor) -> torch.Tensor:
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    largest = diagonal.amax(dim=1, keepdim=True)
    ridge, more_ridge = RIDGES[hessians.dtype]
    diagonal += ridge * largest
    factors: torch.Tensor
    factors, failed = torch.linalg.cholesky_ex(hessians)
    if failed.any():
        diagonal += more_ridge * largest * (failed != 0)[:, None]
        factors, failed = torch.linalg.cholesky_ex(hessians)
    if failed.any():
        raise ForgeError("A probe's Hessian could not be factorised.", next_step=CHECK_ACTIVATIONS)
    return factors


def _dot_rows(vectors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    # The vector goes to the left, because CPUs take batched products in that order several times quicker.
    return torch.bmm(vectors[:, None, :], rows.transpose(1, 2)).squeeze(1)


def _combine_rows(factors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.bmm(factors[:, None, :], rows).squeeze(1)
