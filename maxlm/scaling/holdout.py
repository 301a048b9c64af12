"""What a fit says of runs that it has not seen: errors, prediction intervals and a verdict.

Used for `--holdout`, and by default for the runs of the largest budget: a law that misses the last budget it could have
known will not do better on the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from maxlm.scaling.budgets import budgets
from maxlm.scaling.fit import Fitted, check_design, fit_unchecked, refit
from maxlm.scaling.laws import Law
from maxlm.scaling.runs import Runs
from maxlm.scaling.uncertainty import percentile, stated_weights
from maxlm.schema import ConfigError

FEWEST_AT_TOP = 3  # runs; a top budget of fewer takes the budget below it along
TOP_REPLICATES = 500


@dataclass(frozen=True)
class Assessment:
    """Of `n` unseen runs: relative errors predicted / observed - 1, their prediction intervals, and the verdict.

    `bias` is the mean error; `bias_interval` is where the mean error of as many runs would lie if the law held.
    """

    n: int
    relative_errors: np.ndarray
    lines: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    interval: np.ndarray
    bias: float
    bias_interval: tuple[float, float]
    level: float

    @property
    def inside(self) -> int:
        """How many of the observed losses lie within their own prediction interval."""
        return int(np.sum((self.observed >= self.interval[:, 0]) & (self.observed <= self.interval[:, 1])))

    @property
    def biased(self) -> bool:
        return not self.bias_interval[0] <= self.bias <= self.bias_interval[1]

    @property
    def verdict(self) -> str:
        way = "above" if self.bias > 0 else "below"
        size = (f"predictions are {abs(self.bias):.2%} {way} the {self.n} observed values on average "
                f"({self.inside} inside their own prediction interval)")
        low, high = self.bias_interval
        if self.biased:
            return f"biased: {size}, outside the {self.level:.0%} interval [{low:+.2%}, {high:+.2%}]"
        return f"consistent: {size}, within the {self.level:.0%} interval [{low:+.2%}, {high:+.2%}]"


def assess(fitted: Fitted, theta: np.ndarray, residuals: np.ndarray, unseen: Runs, level: float,
           random: np.random.Generator) -> Assessment:
    """`theta` [replicates, p] are bootstrap fits, `residuals` those of the rows fitted (log loss), drawn as noise."""
    estimate = fitted.log_loss(unseen.columns)
    drawn = prediction_errors(fitted, theta, residuals, unseen.columns, random)
    observed = np.log(unseen.columns[fitted.law.target])
    ends = np.array([percentile(column, level) for column in drawn.T])
    return Assessment(
        n=len(unseen), relative_errors=np.expm1(estimate - observed), lines=unseen.lines, predicted=np.exp(estimate),
        observed=np.exp(observed), interval=np.exp(estimate[:, None] + ends),
        bias=float(np.mean(estimate - observed)), bias_interval=percentile(drawn.mean(1), level), level=level,
    )


def prediction_errors(fitted: Fitted, theta: np.ndarray, residuals: np.ndarray, columns: Mapping[str, np.ndarray],
                      random: np.random.Generator) -> np.ndarray:
    """Draws [replicates, n] of how far the log loss of runs at `columns` may lie from the prediction: how far the
    bootstrap fits `theta` are off, and a residual of the rows fitted, widened by the degrees of freedom, as noise."""
    freedom = max(residuals.size - fitted.theta.size, 1)
    noise = (residuals - np.median(residuals)) * np.sqrt(residuals.size / freedom)
    spread = fitted.log_loss(columns, theta) - fitted.log_loss(columns)
    return spread + random.choice(noise, size=spread.shape)


def top_budget(runs: Runs) -> np.ndarray:
    """[n] of bool: the runs of the largest budget, joined by lower ones until there are FEWEST_AT_TOP."""
    rank = budgets(runs.columns["flops"])
    for lowest in range(rank.max(), -1, -1):
        if np.sum(rank >= lowest) >= FEWEST_AT_TOP:
            break
    return rank >= lowest


def leave_top_budget_out(law: Law, runs: Runs, level: float, seed: int) -> Assessment | str:
    """The fit without the top budget, assessed on it; or why that cannot be done with these runs."""
    if "flops" not in runs.columns:
        return "not tested: these runs have no budgets (flops)"
    top = top_budget(runs)
    below = runs.take(~top)
    try:
        if top.all():
            raise ConfigError("there is only one budget")
        check_design(law, below)
    except ConfigError as reason:
        return f"not tested: without the largest budget there is no fit ({reason})"
    weights = (~top).astype(float)
    fitted = fit_unchecked(law, runs, weights)
    random = np.random.default_rng([seed, 2])
    theta = refit(fitted, runs, weights * stated_weights(law, runs.cluster, TOP_REPLICATES, random))
    return assess(fitted, theta, fitted.residuals(below), runs.take(top), level, random)


def seed_noise(runs: Runs, law: Law) -> tuple[float, int] | None:
    """Standard deviation of the log loss among runs that differ in nothing the law reads, and its degrees of freedom;
    None where no run was repeated."""
    keys = np.stack([runs.columns[name] for name in law.inputs], axis=1)
    _, group = np.unique(keys, axis=0, return_inverse=True)
    logs = np.log(runs.columns[law.target])
    counts = np.bincount(group)
    freedom = int(np.sum(counts - 1))
    if not freedom:
        return None
    means = np.bincount(group, logs) / counts
    return float(np.sqrt(np.sum((logs - means[group]) ** 2) / freedom)), freedom
