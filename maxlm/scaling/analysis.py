"""`analyse`: everything `maxlm fit` reports, as one value computed from runs and a law."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maxlm.scaling.diagnostics import Diagnostics, diagnose
from maxlm.scaling.fit import Fitted, flops_per_param_token, point_fit
from maxlm.scaling.holdout import Assessment, assess, leave_top_budget_out, seed_noise
from maxlm.scaling.laws import Law, Natural
from maxlm.scaling.runs import Runs
from maxlm.scaling.uncertainty import Bootstrap, Interval, bootstrap, intervals, profile
from maxlm.schema import ConfigError, require

AHEAD = (1.0, 10.0, 100.0)  # budgets of the frontier, in units of the largest one fitted
FEWEST_REPLICATES = 100


@dataclass(frozen=True)
class Analysis:
    """`table` maps every natural parameter to its estimate and intervals; `frontier` has one such table a budget of
    `flops`, with the keys params, tokens, loss and tokens_per_param (empty for laws without a division of compute)."""

    fitted: Fitted
    runs: Runs
    level: float
    replicates: int
    seed: int
    table: dict[str, dict[str, object]]
    profiles: dict[str, Interval]
    flops: list[float]
    per_param_token: float
    frontier: list[dict[str, dict[str, object]]]
    found: Bootstrap
    diagnostics: Diagnostics
    next_budget: Assessment | str
    holdout: Assessment | None
    condition: str
    seed_noise: tuple[float, int] | None
    seconds: dict[str, float]

    @property
    def verdict(self) -> str:
        """What a reader must know before using an extrapolation of this fit."""
        lost = [name for name in self.fitted.law.exponents if name in self.diagnostics.undetermined]
        if lost:
            return f"do not extrapolate: these runs do not determine {', '.join(lost)}"
        if isinstance(self.next_budget, str):
            return f"extrapolation {self.next_budget}"
        if self.next_budget.biased:
            return ("do not trust the intervals beyond the data: fitted without its largest budget the law is "
                    f"{self.next_budget.verdict}")
        return f"no bias seen at the largest budget when it is left out: {self.next_budget.verdict}"


def analyse(law: Law, runs: Runs, *, replicates: int = 4000, level: float = 0.95, seed: int = 0, holdout: str = "",
            at_flops: Sequence[float] = ()) -> Analysis:
    """Fits `law` to `runs` (less those for which the condition `holdout` holds) and says how far to trust it.

    Raises ConfigError for rows that cannot determine the law, a holdout that leaves nothing on one side, and options
    out of range.
    """
    require(0.5 <= level < 1, f"--level {level} must be from 0.5 to below 1")
    require(replicates >= FEWEST_REPLICATES, f"--bootstrap {replicates} must be at least {FEWEST_REPLICATES}")
    require(all(np.isfinite(c) and c > 0 for c in at_flops), "--at-flops must be numbers above 0")
    kept, unseen = split(runs, holdout)
    clock = [time.perf_counter()]
    fitted = point_fit(law, kept)
    clock.append(time.perf_counter())
    found = bootstrap(fitted, kept, replicates, seed)
    table = intervals(fitted.natural, found, level)
    clock.append(time.perf_counter())
    per = flops_per_param_token(kept, law)
    flops = _budgets_ahead(law, kept, at_flops)
    assessed = None
    if unseen is not None:
        random = np.random.default_rng([seed, 3])
        assessed = assess(fitted, found.stated, fitted.residuals(kept), unseen, level, random)
    ends = {name: row["interval"] for name, row in table.items()}
    return Analysis(
        fitted=fitted, runs=kept, level=level, replicates=replicates, seed=seed, table=table,
        profiles=_profiles(fitted, kept, found, level), flops=flops, per_param_token=per,
        frontier=_frontier(fitted, found, flops, per, level), found=found,
        diagnostics=diagnose(fitted, kept, found, ends),
        next_budget=leave_top_budget_out(law, kept, level, seed), holdout=assessed, condition=holdout,
        seed_noise=seed_noise(kept, law),
        seconds={"point_fit": clock[1] - clock[0], "bootstrap": clock[2] - clock[1]},
    )


def split(runs: Runs, condition: str) -> tuple[Runs, Runs | None]:
    """The runs to fit and those held out."""
    if not condition:
        return runs, None
    held = runs.matching(condition)
    if held.all() or not held.any():
        raise ConfigError(f"--holdout {condition!r} holds for {held.sum()} of {len(runs)} runs; choose one that leaves "
                          "runs on both sides")
    return runs.take(~held), runs.take(held)


def _budgets_ahead(law: Law, runs: Runs, asked: Sequence[float]) -> list[float]:
    if not law.has_frontier:
        return []
    largest = float(runs.columns["flops"].max())
    return sorted({*(largest * factor for factor in AHEAD), *map(float, asked)})


def _frontier(fitted: Fitted, found: Bootstrap, flops: list[float], per: float, level: float) -> list[dict]:
    def at(budget: float, theta: np.ndarray | None) -> Natural:
        return {name: values[..., 0] for name, values in fitted.frontier([budget], per, theta).items()}

    return [intervals(lambda theta, c=budget: at(c, theta), found, level) for budget in flops]


def _profiles(fitted: Fitted, runs: Runs, found: Bootstrap, level: float) -> dict[str, Interval]:
    """Profile intervals of the natural parameters that are a function of one theta alone."""
    result = {}
    for name, index in fitted.law.coordinates.items():
        width = float(np.subtract(*np.percentile(found.stated[:, index], [84.1, 15.9])) / 2)
        ends = []
        for end in profile(fitted, runs, index, width, level):
            theta = fitted.theta.copy()
            theta[index] = end
            ends.append(float(fitted.natural(theta)[name]))
        result[name] = (min(ends), max(ends))
    return result
