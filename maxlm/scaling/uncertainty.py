"""How far the parameters, the frontier and what follows from them can be off: bootstrap intervals and a check.

The stated interval is a percentile interval of a bootstrap over runs. With MANY_RUNS or more, runs are resampled with
replacement (Efron 1979), as for published intervals. With fewer, that over-covers, because a replicate of a small
ladder has lost a third of its design; there every run stays and gets an independent gamma weight of mean one (Rubin
1981 with exponential weights; for M-estimators Chatterjee and Bose 2005), of a variance that is calibrated on
simulated ladders: docs/SCALING.md has the measured coverage. BCa (Efron 1987) and a profile of the objective are
computed beside it, as a check.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from maxlm.scaling.fit import Fitted, refit
from maxlm.scaling.laws import Law, Natural
from maxlm.scaling.runs import Runs
from maxlm.scaling.solver import DELTA, solve

Interval = tuple[float, float]
Quantities = Callable[[np.ndarray | None], Natural]  # theta [replicates, p], or None for the fit's own
MANY_RUNS = 100
WEIGHT_VARIANCE = 0.9  # with 1, intervals of few runs over-cover; the fit is nearly by absolute values
HUGE = 1e300  # stands for infinity where percentiles are interpolated


@dataclass(frozen=True)
class Bootstrap:
    """Replicates of a fit, theta [replicates, p]: `stated` are those of the stated interval, made by `method`; `rows`
    come from resampled runs; `jackknife` [clusters, p] leaves one run out each."""

    method: str
    stated: np.ndarray
    rows: np.ndarray
    jackknife: np.ndarray


def gamma_weights(cluster: np.ndarray, replicates: int, random: np.random.Generator) -> np.ndarray:
    """[replicates, n]: one weight a run, shared by its rows, of mean 1 and variance WEIGHT_VARIANCE."""
    shape = 1 / WEIGHT_VARIANCE
    return random.gamma(shape, size=(replicates, int(cluster.max()) + 1))[:, cluster] / shape


def resampled_weights(cluster: np.ndarray, replicates: int, random: np.random.Generator) -> np.ndarray:
    """[replicates, n]: how often each run was drawn, of as many draws with replacement as there are runs."""
    runs = int(cluster.max()) + 1
    return random.multinomial(runs, np.full(runs, 1 / runs), size=replicates)[:, cluster].astype(float)


def stated_weights(law: Law, cluster: np.ndarray, replicates: int, random: np.random.Generator) -> np.ndarray:
    """[replicates, n]: the weights behind stated intervals for this many runs."""
    resampled = law.whole_runs or int(cluster.max()) + 1 >= MANY_RUNS
    return (resampled_weights if resampled else gamma_weights)(cluster, replicates, random)


def bootstrap(fitted: Fitted, runs: Runs, replicates: int, seed: int) -> Bootstrap:
    """Deterministic for a seed and an order of the rows."""
    clusters = int(runs.cluster.max()) + 1
    left_out = 1.0 - np.eye(clusters)[:, runs.cluster]
    rows = refit(fitted, runs, resampled_weights(runs.cluster, replicates, np.random.default_rng([seed, 0])))
    if fitted.law.whole_runs or clusters >= MANY_RUNS:
        method, stated = "resampled runs", rows
    else:
        method = "gamma weights drawn per run"
        random = np.random.default_rng([seed, 1])
        stated = refit(fitted, runs, stated_weights(fitted.law, runs.cluster, replicates, random))
    return Bootstrap(method, stated, rows, refit(fitted, runs, left_out))


def percentile(values: np.ndarray, level: float) -> Interval:
    """The central interval that holds `level` of `values`, NaN ignored."""
    tail = 100 * (1 - level) / 2
    low, high = np.nanpercentile(np.clip(values, -HUGE, HUGE), [tail, 100 - tail])
    ends = [math.copysign(math.inf, end) if abs(end) >= HUGE else float(end) for end in (low, high)]
    return ends[0], ends[1]


def bca(values: np.ndarray, estimate: float, jackknife: np.ndarray, level: float) -> Interval:
    """Bias-corrected and accelerated percentile interval (Efron 1987)."""
    normal = NormalDist()
    values, jackknife = np.clip(values[~np.isnan(values)], -HUGE, HUGE), jackknife[np.isfinite(jackknife)]
    below = (np.sum(values < estimate) + 0.5) / (values.size + 1)
    shift = normal.inv_cdf(float(below))
    deviation = jackknife.mean() - jackknife
    spread = float(np.sum(deviation**2))
    acceleration = float(np.sum(deviation**3)) / (6 * spread**1.5) if spread else 0.0
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = shift + normal.inv_cdf(tail)
        share = normal.cdf(shift + z / (1 - acceleration * z)) if acceleration * z < 1 else float(z > 0)
        ends.append(float(np.percentile(values, 100 * min(max(share, 0.0), 1.0))))
    return ends[0], ends[1]


def intervals(quantities: Quantities, found: Bootstrap, level: float) -> dict[str, dict[str, object]]:
    """{name: {value, interval, sd, row_percentile, row_bca, row_sd}} for every quantity."""
    estimate, stated, rows, left = (quantities(t) for t in (None, found.stated, found.rows, found.jackknife))
    table = {}
    for name, value in estimate.items():
        value = float(value)
        finite = np.isfinite(value) and np.isfinite(rows[name]).mean() > 0.5
        table[name] = {
            "value": value,
            "interval": percentile(stated[name], level) if finite else (math.nan, math.nan),
            "sd": _sd(stated[name]),
            "row_percentile": percentile(rows[name], level) if finite else (math.nan, math.nan),
            "row_bca": bca(rows[name], value, left[name], level) if finite else (math.nan, math.nan),
            "row_sd": _sd(rows[name]),
        }
    return table


def _sd(values: np.ndarray) -> float:
    """NaN where some replicates ran away."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.std(values[~np.isnan(values)]))


def profile(fitted: Fitted, runs: Runs, index: int, width: float, level: float) -> Interval:
    """The values of theta[index] that the objective does not reject, the other parameters fitted anew at each.

    The rise of the objective that is rejected is that of a quasi-likelihood ratio, (E psi^2 / E psi') F / 2 with F the
    quantile of F(1, n - p); residuals are taken as equally spread, so this is a check and not the stated interval.
    `width` is a standard deviation to search with.
    """
    size = fitted.theta.size
    grid = fitted.theta[index] + width * np.linspace(-6, 6, 49)
    starts = np.repeat(fitted.theta[None], grid.size, axis=0)
    starts[:, index] = grid
    free = np.ones(size)
    free[index] = 0
    x, y = fitted.inputs(runs.columns), fitted.target(runs.columns[fitted.law.target])
    rise = solve(fitted.law.predict, x, y, starts, free=free).objective - fitted.objective
    allowed = rise_allowed(fitted.residuals(runs), size, level)
    inside = np.flatnonzero(rise <= allowed)
    low, high = inside[0], inside[-1]

    def crossing(inner, outer):
        if not 0 <= outer < grid.size:
            return grid[inner]
        share = (allowed - rise[inner]) / (rise[outer] - rise[inner])
        return grid[inner] + share * (grid[outer] - grid[inner])

    return float(crossing(low, low - 1)), float(crossing(high, high + 1))


def rise_allowed(residuals: np.ndarray, parameters: int, level: float) -> float:
    freedom = residuals.size - parameters
    spread = robust_sd(residuals, parameters)
    squared = float(np.sum(np.minimum(np.abs(residuals), DELTA) ** 2)) / freedom
    slope = math.erf(DELTA / (spread * math.sqrt(2))) if spread else 1.0
    return squared / slope * student_quantile((1 + level) / 2, freedom) ** 2 / 2


def robust_sd(residuals: np.ndarray, parameters: int) -> float:
    """1.4826 times the median size of the residuals, without as many of the smallest as there are parameters, because a
    fit by absolute values passes through about that many points."""
    return float(1.4826 * np.median(np.sort(np.abs(residuals))[min(parameters, residuals.size - 1) :]))


def student_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's t by the Cornish-Fisher expansion in 1/freedom (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (k + 1) for k, term in enumerate(terms))
