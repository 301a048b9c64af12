"""Which run to make next: the one that narrows the interval of a forecast most for each chip-hour.

A bootstrap fit is a draw of what the law may be. Over the draws, the log loss at the target and at a candidate run vary
together; had the candidate been measured, with the noise of the runs so far, the variance at the target would fall by
cov^2 / (var_candidate + noise^2), as for jointly normal quantities. No fit is made again, so thousands of candidates
cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from maxlm.scaling.analysis import Analysis
from maxlm.scaling.uncertainty import robust_sd
from maxlm.schema import require

BUDGETS, FACTORS = 16, (1 / 4, 1 / 2, 1 / np.sqrt(2), 1.0, np.sqrt(2), 2.0, 4.0)
CENTRAL = (0.5, 99.5)  # percentiles beyond which a draw has run away


@dataclass(frozen=True)
class Candidate:
    """A run, what it costs, and the share by which it narrows the target's interval."""

    params: float
    tokens: float
    flops: float
    hours: float
    narrower: float

    @property
    def per_hour(self) -> float:
        return self.narrower / self.hours


def candidates(analysis: Analysis, target: Mapping[str, float], *, most_flops: float, flops_per_second: float,
               startup_seconds: float) -> list[Candidate]:
    """Runs from the smallest budget fitted up to `most_flops`, at several sizes around the frontier, best first."""
    fitted, runs = analysis.fitted, analysis.runs
    require(fitted.law.has_frontier and not fitted.law.held,
            f"forecast next needs a law of params and tokens alone that has a frontier: not --law {fitted.law.name}")
    least = float(runs.columns["flops"].min())
    require(most_flops > least, f"--max-flops {most_flops:.3g} must be above the smallest budget fitted, {least:.3g}")
    budgets = np.geomspace(least, most_flops, BUDGETS)
    best = fitted.frontier(budgets, analysis.per_param_token)["params"]
    flops = np.repeat(budgets, len(FACTORS))
    params = np.repeat(best, len(FACTORS)) * np.tile(FACTORS, BUDGETS)
    usable = np.isfinite(params)
    flops, params = flops[usable], params[usable]
    require(flops.size > 0, "the fit has no compute-optimal frontier to look for runs around")
    tokens = flops / (analysis.per_param_token * params)
    gain = narrowing(analysis, target, {"params": params, "tokens": tokens})
    hours = (flops / flops_per_second + startup_seconds) / 3600
    found = [Candidate(*map(float, row)) for row in zip(params, tokens, flops, hours, gain, strict=True)]
    return sorted(found, key=lambda candidate: -candidate.per_hour)


def narrowing(analysis: Analysis, target: Mapping[str, float], columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """1 - width after / width before of the law's interval at `target`, for each run of `columns` [n]."""
    fitted, theta = analysis.fitted, analysis.found.stated
    at = {name: np.array([target[name]], float) for name in fitted.law.inputs}
    noise = robust_sd(fitted.residuals(analysis.runs), fitted.theta.size)
    goal = _central(fitted.log_loss(at, theta))
    seen = _central(fitted.log_loss(columns, theta))
    goal, seen = goal - goal.mean(0), seen - seen.mean(0)
    together = (goal * seen).mean(0)
    left = 1 - together**2 / ((goal**2).mean() * ((seen**2).mean(0) + noise**2))
    return 1 - np.sqrt(np.clip(left, 0.0, 1.0))


def _central(values: np.ndarray) -> np.ndarray:
    return np.clip(values, *np.nanpercentile(values, CENTRAL, axis=0))
