"""What can be wrong with a fit that converged: parameters the data do not determine, bounds, patterned residuals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maxlm.scaling.budgets import budgets
from maxlm.scaling.fit import Fitted
from maxlm.scaling.laws import TARGET
from maxlm.scaling.runs import Runs
from maxlm.scaling.uncertainty import Bootstrap, Interval, robust_sd

ILL_CONDITIONED = 1e4
AT_ZERO = 1e-2  # irreducible loss, over the smallest loss, below which it is not seen
STEEP = 3.0  # an exponent above this is a step, not a power law
WIDE = 10.0  # ratio of an interval's ends beyond which a positive parameter has no useful value
COEFFICIENTS = ("A", "B", "N_c", "D_c", "N_1", "g", "c", "d")  # matters of unit: they need not be narrow
FEW_CLUSTERS = 12
COST_RANGE = 1.2
UNFELT = 1e-9  # a parameter whose derivative is smaller than this share of the largest is at a bound, and warned about
PATTERN = 4.0  # standard errors of a budget's mean residual


@dataclass(frozen=True)
class Diagnostics:
    """`residual_sd` robust, `condition` of the Jacobian with columns scaled to length one, `flattest` the direction
    {natural parameter: relative change} along which the replicates spread most, `warnings` one line each."""

    residual_sd: float
    largest_residual: float
    largest_residual_line: int
    condition: float
    flattest: dict[str, float]
    budget_residuals: list[tuple[float, int, float]]
    undetermined: list[str]
    warnings: list[str]


def diagnose(fitted: Fitted, runs: Runs, found: Bootstrap, ends: dict[str, Interval]) -> Diagnostics:
    """`ends` are the intervals of the natural parameters."""
    residuals = fitted.residuals(runs)
    jacobian = fitted.jacobian(runs.columns)
    length = np.linalg.norm(jacobian, axis=0)
    felt = length > UNFELT * length.max()
    condition = float(np.linalg.cond(jacobian[:, felt] / length[felt]))
    worst = int(np.argmax(np.abs(residuals)))
    flattest = _flattest(fitted, found)
    by_budget = _by_budget(runs, residuals)
    lost = _undetermined(ends)
    warnings = [*_bounds(fitted), *_uneven_cost(fitted, runs), *_tell_undetermined(lost, flattest)]
    if condition > ILL_CONDITIONED:
        warnings.append(f"the parameters are nearly dependent in these runs (condition number {condition:.1e}): read "
                        "predictions inside the range of the data, not single parameters")
    clusters = int(runs.cluster.max()) + 1
    if clusters < FEW_CLUSTERS:
        warnings.append(f"only {clusters} independent runs: intervals from so few are not to be relied on")
    sd = robust_sd(residuals, fitted.theta.size)
    for flops, count, mean in by_budget:
        if count >= 4 and abs(mean) > PATTERN * max(sd, 1e-9) / np.sqrt(count):
            warnings.append(f"the {count} runs at about {flops:.2g} FLOPs lie {mean:+.2%} off the law on average, "
                            "which their scatter does not explain")
    return Diagnostics(sd, float(residuals[worst]), int(runs.lines[worst]), condition, flattest, by_budget, lost,
                       warnings)


def _uneven_cost(fitted: Fitted, runs: Runs) -> list[str]:
    if not fitted.law.has_frontier or "share" in fitted.law.held.values():
        return []
    cost = runs.columns["flops"] / (runs.columns["params"] * runs.columns["tokens"])
    if cost.max() < COST_RANGE * cost.min():
        return []
    return [f"flops / (params * tokens) ranges from {cost.min():.3g} to {cost.max():.3g}: the frontier takes "
            f"the median, {np.median(cost):.3g}"]


def _bounds(fitted: Fitted) -> list[str]:
    natural = fitted.natural()
    warnings = []
    if "E" in natural and natural["E"] < AT_ZERO * np.exp(fitted.centre[TARGET]):
        warnings.append("E is at its bound 0: these runs do not show an irreducible loss")
    for name in fitted.law.exponents:
        if natural[name] > STEEP:
            warnings.append(f"{name} = {natural[name]:.2f} is too steep for a power law: it fits a step in the data")
    return warnings


def _undetermined(ends: dict[str, Interval]) -> list[str]:
    """Parameters whose interval holds zero or spans a factor of WIDE."""
    return [name for name, (low, high) in ends.items() if name not in COEFFICIENTS
            and not (low > 0 and high < WIDE * low) and not (high < 0 and low > WIDE * high)]


def _tell_undetermined(lost: list[str], flattest: dict[str, float]) -> list[str]:
    if not lost:
        return []
    along = ", ".join(f"{name} by {change:+.0%}" for name, change in flattest.items() if abs(change) >= 0.01)
    return [f"these runs do not determine {', '.join(lost)}: the fit hardly changes when together {along} change"]


def _flattest(fitted: Fitted, found: Bootstrap) -> dict[str, float]:
    """The direction of largest spread of the replicates, as relative changes of the natural parameters for one standard
    deviation along it (signs are up to a common one)."""
    deviation = np.clip(found.stated - fitted.theta, -20, 20)
    deviation = deviation[np.isfinite(deviation).all(1)]
    _, spread, axes = np.linalg.svd(deviation, full_matrices=False)
    along = fitted.theta + axes[0] * spread[0] / np.sqrt(len(deviation))
    here, there = fitted.natural(), fitted.natural(along)
    with np.errstate(all="ignore"):
        return {name: float(there[name] / here[name] - 1) for name in here}


def _by_budget(runs: Runs, residuals: np.ndarray) -> list[tuple[float, int, float]]:
    """(geometric mean FLOPs, runs, mean residual) of each budget; empty where runs have no budgets."""
    if "flops" not in runs.columns:
        return []
    flops = runs.columns["flops"]
    rank = budgets(flops)
    return [(float(np.exp(np.log(flops[rank == k]).mean())), int(np.sum(rank == k)), float(residuals[rank == k].mean()))
            for k in range(rank.max() + 1)]
