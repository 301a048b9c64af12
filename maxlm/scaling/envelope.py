"""Chinchilla's approach 1: the least loss over all training curves at each compute budget, and power laws through it.

Curves are the rows of one `run` at several numbers of tokens. Each is read at a common grid of budgets: log loss is
linear in log FLOPs between its rows, and nothing is read beyond them. At each budget the run of lowest loss gives N*;
log N* against log N D is a line, L* a power law with an offset. Bootstrap replicates draw whole runs with replacement,
because an envelope does not feel weights.

A point in the middle of a run whose learning rate falls at the end lies above what a run of that length reaches, so
curves of one schedule length each bend the envelope; ladders with several lengths a size, or of constant rate, do not.

`theta` is that of isoflop.py, its curvature a line through what the rows near the envelope say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from maxlm.scaling.isoflop import line, offset_power_law
from maxlm.scaling.runs import Runs
from maxlm.schema import require

PER_OCTAVE = 4  # budgets of the grid
FEWEST_CURVES, FEWEST_POINTS = 3, 3
NEAR = 0.1  # rows further above the envelope than this, in log loss, say nothing about its neighbourhood


def curves_at_budgets(runs: Runs) -> Runs:
    """The curves of `runs` at a common grid of budgets: a row for each run and budget that it reached, if NEAR the
    envelope. A budget is left out that fewer than FEWEST_CURVES runs reached, or whose best run is the smallest or the
    largest of them: the envelope of more sizes would lie elsewhere. Raises ConfigError where rows are no curves."""
    count = int(runs.cluster.max()) + 1
    sizes = np.bincount(runs.cluster)
    require(count >= FEWEST_CURVES and int(np.sum(sizes >= 2)) >= FEWEST_CURVES,
            f"envelope reads training curves, rows of one `run` at several numbers of tokens: {runs.source} has "
            f"{count} runs in {len(runs)} rows; give curves.jsonl, or name the column with --columns run=ITS_NAME")
    columns = runs.columns
    flops, loss = np.log(columns["flops"]), np.log(columns["loss"])
    step = np.log(2) / PER_OCTAVE
    grid = np.arange(np.ceil(flops.min() / step), np.floor(flops.max() / step) + 1) * step
    table = np.full((count, grid.size), np.nan)
    for k in range(count):
        rows = np.flatnonzero(runs.cluster == k)
        rows = rows[np.argsort(flops[rows])]
        table[k] = np.interp(grid, flops[rows], loss[rows], left=np.nan, right=np.nan)
    first = np.array([np.flatnonzero(runs.cluster == k)[0] for k in range(count)])
    size = columns["params"][first]
    reached = np.isfinite(table)
    seen = np.where(reached, table, np.inf)
    best, sizes = size[np.argmin(seen, axis=0)], np.where(reached, size[:, None], np.nan)
    inner = [row.sum() >= FEWEST_CURVES and np.nanmin(column) < middle < np.nanmax(column)
             for row, column, middle in zip(reached.T, sizes.T, best, strict=True)]
    run, place = np.nonzero((seen <= seen.min(0)[None] + NEAR) & reached & np.array(inner)[None])
    require(run.size > 0, f"{runs.source}: at no compute budget does a run lie below both a smaller and a larger one")
    params, budget = size[run], np.exp(grid[place])
    cost = np.median(columns["flops"] / (columns["params"] * columns["tokens"]))
    made = {"params": params, "tokens": budget / (cost * params), "flops": budget, "loss": np.exp(table[run, place])}
    note = f"{len(runs)} rows of {count} curves were read at {np.unique(place).size} budgets"
    return replace(runs, columns=made, cells={}, lines=runs.lines[first[run]], notes=(*runs.notes, note),
                   cluster=np.unique(run, return_inverse=True)[1])


def check(columns: Mapping[str, np.ndarray]) -> None:
    """Raises ConfigError where the envelope belongs to too few sizes to have a slope."""
    budget = columns["params"] * columns["tokens"]
    best = {float(columns["params"][rows][np.argmin(columns["loss"][rows])]) for rows in _groups(np.log(budget))}
    require(len(best) >= FEWEST_POINTS, f"the envelope of these curves belongs to {len(best)} model sizes: at least "
                                        f"{FEWEST_POINTS} are needed, so add runs of other sizes")


def estimate(x: Mapping[str, np.ndarray], y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """theta [replicates, 7] for `weights` [replicates, n], of which only what is above 0 counts."""
    budget = x["params"] + x["tokens"]
    groups = _groups(budget)
    where = np.broadcast_to([budget[rows].mean() for rows in groups], (len(weights), len(groups)))
    best, least = np.empty(where.shape), np.empty(where.shape)
    for k, rows in enumerate(groups):
        seen = np.where(weights[:, rows] > 0, y[rows], np.inf)
        chosen = np.argmin(seen, axis=1)
        best[:, k], least[:, k] = x["params"][rows][chosen], np.min(seen, axis=1)
    known = np.isfinite(least)
    fill = lambda a: np.where(known, a, 0.0)  # noqa: E731
    slope, level = line(where, fill(best), known.astype(float))
    envelope = offset_power_law(where[0], fill(least), known.astype(float))
    bend = _curvature(x["params"], budget, y, weights, envelope, level, slope)
    theta = np.column_stack([envelope, level, slope, bend, np.zeros(len(weights))])
    theta[known.sum(1) < FEWEST_POINTS] = np.nan
    return theta


def _curvature(params, budget, y, weights, envelope, level, slope):
    """log of h [replicates] in log L = log L* + h (log N - log N*)^2, by least squares."""
    e, a, gamma = (column[:, None] for column in envelope.T)
    above = y - np.logaddexp(e, a - gamma * budget)
    square = (params - level[:, None] - slope[:, None] * budget) ** 2
    ratio = (weights * square * above).sum(1) / np.maximum((weights * square**2).sum(1), 1e-300)
    return np.log(np.maximum(ratio, 1e-6))


def _groups(budget: np.ndarray) -> list[np.ndarray]:
    """The rows of each budget of the grid."""
    number = np.round((budget - budget.min()) / (np.log(2) / PER_OCTAVE)).astype(int)
    return [np.flatnonzero(number == k) for k in np.unique(number)]
