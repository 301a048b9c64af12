"""Minimises sums of Huber losses, for many starting points and many weightings of the rows at once, in float64.

The objective of one fit is sum_i w_i H(f_i(theta) - y_i), where H is quadratic within delta and linear beyond it. Where
residuals are ten times delta it is close to a sum of absolute values, which line searches find hard: from published
start grids SciPy's L-BFGS-B stops early almost everywhere. Each iteration here takes the best of damped steps:

- reweighted Levenberg-Marquardt: the curvature J'WJ with W_i = w_i min(1, delta/|r_i|) bounds the Huber loss from
  above, so it descends from anywhere, but closes the gap only linearly;
- Newton: the loss's own curvature, J'J over the rows within delta plus the model's second derivatives, which finishes
  to rounding once the right rows are within delta.

Most laws are sums of power laws (`Sum`) whose coefficients enter theta as logarithms. Where the best coefficient is 0
its logarithm has no optimum, and steps in it crawl. So their steps are taken in the coefficients themselves: one that
would fall below a tenth of its value falls to that, with the other parameters' step solved for anew. A Newton step in
the logarithms competes with it, because the way to a very steep term is straight in them.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DELTA = 1e-3
CHUNK_ROWS = 4096  # rows of the problems solved together: their Jacobians stay in cache
ITERATIONS = 4  # between looks at which problems are finished
PROGRESS = 1e-10  # of the objective: a Newton step damped by less than TRUSTED that promises less: finished
TRUSTED = 0.1
PATIENCE = 12  # iterations in a row that take less than PROGRESS away: finished, too
MAX_DAMPING, MIN_DAMPING = 1e8, 1e-12
FALL = 0.9  # the largest share of a coefficient that one step takes away
LEAST = -40.0  # the logarithm of a coefficient that is 0

Columns = Mapping[str, np.ndarray]
Predict = Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array]


class Solutions(NamedTuple):
    """`theta` [problems, p], `objective` [problems], and whether each stopped improving, `converged` [problems]."""

    theta: np.ndarray
    objective: np.ndarray
    converged: np.ndarray


@dataclass(frozen=True, eq=False)  # one object a law: hashed by identity where it is compiled for
class Sum:
    """A model that is log sum_k exp(terms(theta, columns)[k]), each of the `terms` [k, n] linear in theta.

    `coefficients` are the places in theta that are the logarithm of one term's coefficient, and enter nothing else.
    """

    terms: Callable[[jax.Array, Mapping[str, jax.Array]], tuple[jax.Array, ...]]
    coefficients: tuple[int, ...]

    def __call__(self, theta: jax.Array, columns: Mapping[str, jax.Array]) -> jax.Array:
        return jax.nn.logsumexp(self.stacked(theta, columns), axis=0)

    def stacked(self, theta: jax.Array, columns: Mapping[str, jax.Array]) -> jax.Array:
        return jnp.stack(jnp.broadcast_arrays(*self.terms(theta, columns), *columns.values())[: -len(columns)])


@contextlib.contextmanager
def float64_on_cpu():
    """Float64 inside, on the CPU whatever the default device is; nothing outside changes. Holds for this thread."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def huber(residual: jax.Array, delta: float = DELTA) -> jax.Array:
    """Elementwise r^2 / 2 within delta, delta (|r| - delta / 2) beyond it (Huber 1964)."""
    size = abs(residual)
    return jnp.where(size <= delta, residual**2 / 2, delta * (size - delta / 2))


def solve(
    predict: Predict, columns: Columns, target: np.ndarray, starts: np.ndarray, weights: np.ndarray | None = None,
    free: np.ndarray | None = None, *, delta: float = DELTA, max_iterations: int = 200,
) -> Solutions:
    """One fit for each row of `starts` [problems, p].

    `predict(theta [p], columns)` gives [n]; `columns` hold [n] values; `target` is [n] or [problems, n]; `weights` is
    None (all one), [n] or [problems, n]; `free` is None or [p] or [problems, p] of 0 and 1, where 0 keeps a parameter
    at its start.
    """
    starts = np.asarray(starts, np.float64)
    problems = starts.shape[0]
    columns = {name: np.asarray(column, np.float64) for name, column in columns.items()}
    rows = np.shape(target)[-1]
    fill = lambda a, shape: np.broadcast_to(np.asarray(a, np.float64), shape)  # noqa: E731
    target = fill(target, (problems, rows))
    weights = fill(1.0 if weights is None else weights, (problems, rows))
    free = fill(1.0 if free is None else free, starts.shape)
    damping = [1e-3, 1e-2, 1e-2] if isinstance(predict, Sum) else [1e-3, 1e-2]
    state = [starts.copy(), np.full(problems, np.nan), np.tile(damping, (problems, 1)), np.zeros(problems)]
    size = 2 ** int(np.clip(np.log2(CHUNK_ROWS / rows), 3, 7))

    def run(chunk):
        padded = np.resize(chunk, size)  # the last chunk repeats its problems, so that one program serves all
        with float64_on_cpu():
            found = _solve_chunk(predict, delta, columns, target[padded], weights[padded], free[padded],
                                 [a[padded] for a in state])
        for whole, part in zip(state, found, strict=True):
            whole[chunk] = np.asarray(part)[: chunk.size]

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for iteration in range(0, max_iterations, ITERATIONS):
            left = np.flatnonzero(state[-1] < PATIENCE)
            chunks = [left[i : i + size] for i in range(0, left.size, size)]
            if not iteration:
                run(chunks.pop(0))  # compiles once, before the threads
            list(pool.map(run, chunks))
    theta, objective, _, stalled = state
    return Solutions(theta, objective, stalled >= PATIENCE)


def predict_each(predict: Predict, theta: np.ndarray, columns: Columns) -> np.ndarray:
    """[problems, n] for `theta` [problems, p]."""
    with float64_on_cpu():
        return np.asarray(_predict_each(predict, theta, columns))


@functools.partial(jax.jit, static_argnums=0)
def _predict_each(predict, theta, columns):
    return jax.vmap(lambda t: predict(t, columns))(theta)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solve_chunk(predict, delta, columns, target, weights, free, state):
    derivatives = (_of_sum if isinstance(predict, Sum) else _of_any)(predict, columns, free.shape[1])
    return jax.vmap(functools.partial(_solve_one, predict, derivatives, delta, columns))(target, weights, free, state)


def _of_any(predict, columns, size):
    """theta [p] -> values [n], their Jacobian [p, n], and from factors [n] the Hessian [p, p] of factors @ values."""
    def at(theta):
        values = predict(theta, columns)
        jacobian = jax.vmap(lambda v: jax.jvp(lambda t: predict(t, columns), (theta,), (v,))[1])(jnp.eye(size))
        return values, jacobian, lambda factors: jax.hessian(lambda t: factors @ predict(t, columns))(theta)

    return at


def _of_sum(predict, columns, size):
    """The same in closed form: one matrix product for all problems instead of `size` sweeps over the terms."""
    slopes = jnp.moveaxis(jax.jacfwd(predict.stacked)(jnp.zeros(size), columns), -1, 0)  # [p, k, n]
    upper = np.triu_indices(size)
    products = (slopes[upper[0]] * slopes[upper[1]]).reshape(upper[0].size, -1)
    place = np.zeros((size, size), int)
    place[upper] = place[upper[::-1]] = np.arange(upper[0].size)

    def at(theta):
        powers = jnp.exp(predict.stacked(theta, columns))
        total = powers.sum(0)
        shares = powers / total[None]
        jacobian = sum(shares[k][None] * slopes[:, k] for k in range(len(shares)))

        def hessian(factors):
            return (products @ (factors[None] * shares).reshape(-1))[place] - (jacobian * factors[None]) @ jacobian.T

        return jnp.log(total), jacobian, hessian

    return at


def _solve_one(predict, derivatives, delta, columns, target, weights, free, state):
    """ITERATIONS of one problem. `state`: theta [p], its objective, the damping of each kind of step, and the
    iterations in a row without progress."""
    linear = np.isin(np.arange(free.size), predict.coefficients if isinstance(predict, Sum) else ())

    def total(residual):
        value = jnp.sum(weights * huber(residual, delta))
        return jnp.where(jnp.isfinite(value), value, jnp.inf)

    def iterate(state, _):
        theta, _, damping, stalled = state
        values, jacobian, hessian = derivatives(theta)
        residual, jacobian = values - target, jacobian * free[:, None]
        value = total(residual)
        inner = abs(residual) <= delta
        majorant = weights * jnp.where(inner, 1.0, delta / jnp.maximum(abs(residual), delta))
        pull = majorant * residual  # the derivative of the Huber loss
        slope = jacobian @ pull
        gram = lambda w: (jacobian * w[None]) @ jacobian.T  # noqa: E731
        bound = gram(majorant)
        curvature = gram(weights * inner) + hessian(pull) * jnp.outer(free, free)
        # Coefficients close to 0 must be able to come back; what the model does not feel must stay.
        scale = jnp.diagonal(bound) + jnp.where(linear, 1e-30, 1e-12) * jnp.trace(bound)
        damped = jax.vmap(lambda mu: jnp.diag(mu * scale + 1 - free))(damping)
        steps, promise = _steps(linear, bound, curvature, slope, damped)
        tried = jax.vmap(lambda step: total(predict(theta - step, columns) - target))(steps)
        better = tried < value
        at_rest = (promise < PROGRESS * value) & (damping[1] < TRUSTED)
        damping = jnp.clip(jnp.where(better, damping / 5, damping * 4), MIN_DAMPING, MAX_DAMPING)
        best = jnp.argmin(tried)
        moved = theta - steps[best]
        theta = jnp.where(better[best], jnp.where(linear, jnp.maximum(moved, LEAST), moved), theta)
        left = jnp.minimum(tried[best], value)
        waited = jnp.where(value - left > PROGRESS * value, 0.0, stalled + 1)
        stalled = jnp.where(at_rest, float(PATIENCE), waited)
        return (theta, left, damping, stalled), None

    return jax.lax.scan(iterate, tuple(state), length=ITERATIONS)[0]


def _steps(linear, bound, curvature, slope, damped):
    """What to subtract from theta, each kind of step [kinds, p], and what the Newton step promises to take away.

    Where there are coefficients (`linear` [p]) they are Levenberg-Marquardt and Newton in relative changes of them, and
    Newton in their logarithms; where there are none, Levenberg-Marquardt and Newton.
    """
    solved = jax.vmap(_solve_positive, in_axes=(0, None))
    if not linear.any():
        steps = solved(jnp.stack([bound, curvature]) + damped, slope)
        return steps, slope @ steps[1] / 2
    matrices = jnp.stack([bound, curvature - jnp.diag(linear * slope), curvature]) + damped
    steps = solved(matrices, slope)
    relative = jax.vmap(functools.partial(_held_at_fall, linear, slope))(matrices[:2], steps[:2])
    in_logarithms = jnp.where(linear[None], -jnp.log1p(-relative), relative)
    return jnp.concatenate([in_logarithms, steps[2:]]), slope @ relative[1] / 2


def _held_at_fall(linear, slope, matrix, step):
    """`step` [p] with the coefficients that would lose more than FALL held at that, and the rest solved for anew."""
    held = linear & (step > FALL)
    rest = 1.0 - held
    right = rest * (slope - matrix @ (FALL * held)) + FALL * held
    step = _solve_positive(matrix * jnp.outer(rest, rest) + jnp.diag(1 - rest), right)
    return jnp.where(linear, jnp.minimum(step, FALL), step)


def _solve_positive(matrix, right):
    """x [p] with matrix @ x = right, NaN where the matrix is not positive definite: elimination, pivots above 0.
    A batch of these is one small loop, where a library call would go through them one by one."""
    size = right.size

    def eliminate(j, state):
        rows, positive = state  # [p, p + 1]
        pivot = rows[j, j]
        row = rows[j] / pivot
        rows = jnp.where(jnp.arange(size)[:, None] == j, row[None], rows - jnp.outer(rows[:, j], row))
        return rows, positive & (pivot > 0)

    rows, positive = jax.lax.fori_loop(0, size, eliminate, (jnp.column_stack([matrix, right]), True))
    return jnp.where(positive, rows[:, -1], jnp.nan)
