"""Minimises sums of Huber losses, for many starting points and many weightings of the rows at once, in float64.

The objective of one fit is sum_i w_i H(f_i(theta) - y_i), where H is quadratic within delta and linear beyond it. Where
residuals are ten times delta it is close to a sum of absolute values, which line searches find hard: from published
start grids SciPy's L-BFGS-B stops early almost everywhere. Each iteration here takes the better of two damped steps:

- reweighted Levenberg-Marquardt: the curvature J'WJ with W_i = w_i min(1, delta/|r_i|) bounds the Huber loss from
  above, so it descends from anywhere, but closes the gap only linearly;
- Newton: the loss's own curvature, J'J over the rows within delta plus the model's second derivatives, which finishes
  to rounding once the right rows are within delta.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DELTA = 1e-3
CHUNK = 64  # problems solved together: their Jacobians stay in cache
ITERATIONS = 4  # between looks at which problems are finished
PATIENCE = 4  # iterations in a row that take less than PROGRESS of the objective away: finished
PROGRESS = 1e-10
MAX_DAMPING, MIN_DAMPING = 1e8, 1e-12

Columns = Mapping[str, np.ndarray]
Predict = Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array]


class Solutions(NamedTuple):
    """`theta` [problems, p], `objective` [problems], and whether each stopped improving, `converged` [problems]."""

    theta: np.ndarray
    objective: np.ndarray
    converged: np.ndarray


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
    state = [starts.copy(), np.full(problems, np.nan), np.tile([1e-3, 1e-2], (problems, 1)), np.zeros(problems)]

    def run(chunk):
        padded = np.resize(chunk, CHUNK)  # the last chunk repeats its problems, so that one program serves all
        with float64_on_cpu():
            found = _solve_chunk(predict, delta, columns, target[padded], weights[padded], free[padded],
                                 [a[padded] for a in state])
        for whole, part in zip(state, found, strict=True):
            whole[chunk] = np.asarray(part)[: chunk.size]

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for iteration in range(0, max_iterations, ITERATIONS):
            left = np.flatnonzero(state[-1] < PATIENCE)
            chunks = [left[i : i + CHUNK] for i in range(0, left.size, CHUNK)]
            if not iteration:
                run(chunks.pop(0))  # compiles once, before the threads
            list(pool.map(run, chunks))
    theta, objective, _, stalled = state
    return Solutions(theta, objective, stalled >= PATIENCE)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solve_chunk(predict, delta, columns, target, weights, free, state):
    return jax.vmap(functools.partial(_solve_one, predict, delta, columns))(target, weights, free, state)


def _solve_one(predict, delta, columns, target, weights, free, state):
    """ITERATIONS of one problem. `state`: theta [p], its objective, the damping of each kind of step [2], and the
    iterations in a row without progress."""

    def model(theta):
        return predict(theta, columns)

    def objective(theta):
        value = jnp.sum(weights * huber(model(theta) - target, delta))
        return jnp.where(jnp.isfinite(value), value, jnp.inf)

    def iterate(state, _):
        theta, value, damping, stalled = state
        residual = model(theta) - target
        jacobian = jax.vmap(lambda v: jax.jvp(model, (theta,), (v,))[1])(jnp.diag(free))  # [p, n]
        inner = abs(residual) <= delta
        majorant = weights * jnp.where(inner, 1.0, delta / jnp.maximum(abs(residual), delta))
        pull = majorant * residual  # the derivative of the Huber loss
        curved = jax.hessian(lambda t: jnp.sum(pull * model(t)))(theta) * jnp.outer(free, free)
        gram = lambda w: (jacobian * w[None]) @ jacobian.T  # noqa: E731
        curvatures = jnp.stack([gram(majorant), gram(weights * inner) + curved])
        scale = jnp.diagonal(curvatures[0]) + 1e-12 * jnp.trace(curvatures[0])
        matrices = curvatures + jax.vmap(lambda mu: jnp.diag(mu * scale + 1 - free))(damping)
        steps = jax.vmap(_solve_positive, in_axes=(0, None))(matrices, jacobian @ pull)
        values = jax.vmap(lambda step: objective(theta - step))(steps)
        better = values < value
        damping = jnp.clip(jnp.where(better, damping / 5, damping * 4), MIN_DAMPING, MAX_DAMPING)
        best = jnp.argmin(values)
        theta = jnp.where(better[best], theta - steps[best], theta)
        left = jnp.minimum(values[best], value)
        stalled = jnp.where(value - left > PROGRESS * value, 0.0, stalled + 1)
        return (theta, left, damping, stalled), None

    theta, _, *rest = state
    return jax.lax.scan(iterate, (theta, objective(theta), *rest), length=ITERATIONS)[0]


def _solve_positive(matrix, right):
    """x [p] with matrix @ x = right, NaN where the matrix is not positive definite. An unrolled Cholesky factorisation:
    a batch of these is a few fused loops, where a library call would go through them one by one."""
    size = matrix.shape[0]
    low = [[None] * size for _ in range(size)]
    for j in range(size):
        low[j][j] = jnp.sqrt(matrix[j, j] - sum(low[j][k] ** 2 for k in range(j)))
        for i in range(j + 1, size):
            low[i][j] = (matrix[i, j] - sum(low[i][k] * low[j][k] for k in range(j))) / low[j][j]
    forward, back = [None] * size, [None] * size
    for i in range(size):
        forward[i] = (right[i] - sum(low[i][k] * forward[k] for k in range(i))) / low[i][i]
    for i in reversed(range(size)):
        back[i] = (forward[i] - sum(low[k][i] * back[k] for k in range(i + 1, size))) / low[i][i]
    return jnp.stack(back)
