"""Chinchilla's approach 2: a parabola through each budget's losses, and power laws through the minima.

Stage one fits loss = L* + k (log N - log N*)^2 to the runs of each budget by least squares; stage two fits log N*
against log C by least squares, and L* = E + A / C^gamma by the Huber loss. A budget whose parabola has no minimum
between its smallest and largest model (with half a grid's width to spare) says nothing about either and is left out.

`theta` is (log E, log A, gamma, log N* at the centre, a, and a line for log(k / L*) against log C): a joint form of the
same statement, so that losses can be predicted. Columns are centred logarithms, as in laws.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from maxlm.scaling.budgets import budgets
from maxlm.scaling.solver import Sum, solve
from maxlm.schema import require

FEWEST_BUDGETS, FEWEST_SIZES = 4, 4
SPARE = 0.5  # of the range of log N in a budget, by which a minimum may lie outside it


def predict(theta, x):
    e, a, gamma, best, slope, bend, bend_slope = theta
    budget = x["params"] + x["tokens"]
    off = x["params"] - best - slope * budget
    return jnp.logaddexp(e, a - gamma * budget) + jnp.exp(bend + bend_slope * budget) * off**2


def natural(theta, centre):
    """In terms of N D rather than C: N* = N_1 (N D)^a and L* = E + A / (N D)^gamma."""
    e, a, gamma, best, slope, _, _ = np.moveaxis(np.asarray(theta), -1, 0)
    middle = centre["params"] + centre["tokens"]
    return {"E": np.exp(e + centre["target"]), "A": np.exp(a + centre["target"] + gamma * middle), "gamma": gamma,
            "a": slope, "b": 1 - slope, "N_1": np.exp(best + centre["params"] - slope * middle)}


def check(columns: Mapping[str, np.ndarray]) -> None:
    """Raises ConfigError unless there are enough budgets with enough sizes each."""
    rank = budgets(columns["params"] * columns["tokens"])
    sizes = [np.unique(columns["params"][rank == k]).size for k in range(rank.max() + 1)]
    good = sum(size >= FEWEST_SIZES for size in sizes)
    require(good >= FEWEST_BUDGETS, f"isoflop needs {FEWEST_BUDGETS} budgets of at least {FEWEST_SIZES} model sizes: "
                                    f"these runs have {good}")


def estimate(x: Mapping[str, np.ndarray], y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """theta [replicates, 7] for `weights` [replicates, n]; NaN where fewer than three budgets have a minimum."""
    budget = x["params"] + x["tokens"]
    rank = budgets(np.exp(budget))
    minima = [_minimum(x["params"][rank == k], np.exp(y[rank == k]), weights[:, rank == k], np.mean(budget[rank == k]))
              for k in range(rank.max() + 1) if np.unique(x["params"][rank == k]).size >= FEWEST_SIZES]
    where, best, loss, relative = (np.stack(values, axis=1) for values in zip(*minima, strict=True))
    known = np.isfinite(best)
    weight = known.astype(float)
    fill = lambda a, default: np.where(known, a, default)  # noqa: E731
    slope, level = line(where, fill(best, 0.0), weight)
    bend_slope, bend = line(where, np.log(fill(relative, 1.0)), weight)
    envelope = offset_power_law(where[0], np.log(fill(loss, 1.0)), weight)
    theta = np.column_stack([envelope, level, slope, bend, bend_slope])
    theta[known.sum(1) < 3] = np.nan
    return theta


def _minimum(log_params, loss, weights, budget):
    """(log budget, log N*, L*, k / L*), each [replicates], of the weighted parabola through one budget."""
    centre = log_params.mean()
    powers = np.stack([np.ones_like(log_params), log_params - centre, (log_params - centre) ** 2])
    matrix = np.einsum("rn,in,jn->rij", weights, powers, powers) + 1e-12 * np.eye(3)
    c0, c1, c2 = np.linalg.solve(matrix, np.einsum("rn,in,n->ri", weights, powers, loss)[..., None])[..., 0].T
    with np.errstate(divide="ignore", invalid="ignore"):
        best = -c1 / (2 * c2)
        least = c0 - c1**2 / (4 * c2)
    spare = SPARE * np.ptp(log_params)
    low, high = log_params.min() - centre - spare, log_params.max() - centre + spare
    inside = (c2 > 0) & (best > low) & (best < high) & (least > 0)
    mask = lambda a: np.where(inside, a, np.nan)  # noqa: E731
    return np.full(best.size, budget), mask(best + centre), mask(least), mask(c2 / np.where(inside, least, 1.0))


def line(x, y, weights):
    """(slope, value at x = 0) of the weighted least-squares line of each replicate [replicates, budgets]."""
    total = np.maximum(weights.sum(1), 1e-300)
    mean_x, mean_y = (weights * x).sum(1) / total, (weights * y).sum(1) / total
    dx, dy = x - mean_x[:, None], y - mean_y[:, None]
    slope = (weights * dx * dy).sum(1) / np.maximum((weights * dx**2).sum(1), 1e-300)
    return slope, mean_y - slope * mean_x


def offset_power_law(budget, log_loss, weights):
    """(e, a, gamma) [replicates, 3] of log_loss = logaddexp(e, a - gamma budget), from the best of a grid of starts."""
    columns = {"budget": budget}
    grid = np.array([(np.log(offset), np.log(1.3 - offset), gamma) for offset, gamma in itertools.product(
        (0.3, 0.6, 0.8, 0.95), (0.05, 0.1, 0.2, 0.4))])
    whole = np.where(weights.sum(0) > 0, np.nansum(weights * log_loss, 0) / np.maximum(weights.sum(0), 1e-300), 0.0)
    first = solve(_power, columns, whole, grid, (weights.sum(0) > 0).astype(float))
    start = first.theta[np.argmin(first.objective)]
    return solve(_power, columns, log_loss, np.broadcast_to(start, (len(log_loss), 3)), weights).theta


_power = Sum(lambda theta, columns: (theta[0], theta[1] - theta[2] * columns["budget"]), (0, 1))
