"""Speed of a whole Chinchilla fit: every start and 4,000 bootstrap replicates, against a SciPy loop in the same run.

    python3 benchmarks/fit_speed.py --json record.json        (SciPy comes with JAX)

Times the multi-start fit, the replicates (both with the programs compiled, and the first call with compilation apart),
and L-BFGS-B with gradients by hand, an objective scaled by 1e6 and tight tolerances, started at the optimum, on the
first `--scipy` of the same replicates. The gap of a replicate is its objective over the least known: from either
program, from ours started at SciPy's answers, and from ours started again beside its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed
# SciPy's loop is of short products: threads of BLAS slow it down, 1.8 ms a fit to 7 to 72 ms on busy cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
import scipy
from scipy.optimize import minimize

from maxlm.scaling.fit import Fitted, point_fit
from maxlm.scaling.laws import find_law
from maxlm.scaling.runs import Runs, read_runs
from maxlm.scaling.solver import DELTA, solve
from maxlm.scaling.uncertainty import resampled_weights

GOLDEN = Path(__file__).resolve().parent.parent / "tests/golden/chinchilla_epoch.csv"
LAW = find_law("chinchilla")
OBJECTIVE_SCALE = 1e6


def scipy_fit(x, y: np.ndarray, start: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """(objective, theta) of one replicate."""

    def value_and_slope(theta):
        e, a, b, alpha, beta = theta
        terms = np.exp([np.full(y.size, e), a - alpha * x["params"], b - beta * x["tokens"]])
        total = terms.sum(0)
        residual = np.log(total) - y
        size = np.abs(residual)
        value = np.sum(weights * np.where(size <= DELTA, residual**2 / 2, DELTA * (size - DELTA / 2)))
        pull = weights * np.clip(residual, -DELTA, DELTA)
        shares = pull * terms / total
        slope = np.array([*shares.sum(1), -(shares[1] @ x["params"]), -(shares[2] @ x["tokens"])])
        return OBJECTIVE_SCALE * value, OBJECTIVE_SCALE * slope

    found = minimize(value_and_slope, start, jac=True, method="L-BFGS-B",
                     options={"ftol": 1e-14, "gtol": 1e-8, "maxiter": 2000, "maxfun": 4000})
    return found.fun / OBJECTIVE_SCALE, found.x


def timed(work) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(runs: Runs, replicates: int, scipy_replicates: int) -> dict[str, object]:
    first, fitted = timed(lambda: point_fit(LAW, runs))
    starts, _ = timed(lambda: point_fit(LAW, runs))
    weights = resampled_weights(runs.cluster, replicates, np.random.default_rng(0))
    x, y = fitted.inputs(runs.columns), fitted.target(runs.columns["loss"])
    begin = np.broadcast_to(fitted.theta, (replicates, fitted.theta.size))
    seconds, ours = timed(lambda: solve(LAW.predict, x, y, begin, weights))
    theirs_seconds, theirs = timed(lambda: [scipy_fit(x, y, fitted.theta, w) for w in weights[:scipy_replicates]])
    best = _reference(fitted, x, y, weights, ours, theirs)
    gap, their_gap = ours.objective / best - 1, np.array([v for v, _ in theirs]) / best[:scipy_replicates] - 1
    tail = lambda g: dict(zip(("p50", "p95", "max"), np.percentile(g, [50, 95, 100]), strict=True))  # noqa: E731
    per_fit, their_per_fit = seconds / replicates, theirs_seconds / scipy_replicates
    return {
        "rows": len(runs), "replicates": replicates, "starts": fitted.num_starts,
        "starts_at_optimum": fitted.starts_at_optimum, "objective": fitted.objective,
        "first_fit_seconds_with_compilation": first, "multi_start_seconds": starts, "bootstrap_seconds": seconds,
        "multi_start_and_bootstrap_seconds": starts + seconds, "gap": tail(gap),
        "converged": float(ours.converged.mean()),
        "scipy": {"replicates": scipy_replicates, "seconds_a_fit": their_per_fit, "gap": tail(their_gap)},
        "times_as_fast_as_scipy_loop": their_per_fit / per_fit,
    }


def _reference(fitted: Fitted, x, y, weights, ours, theirs) -> np.ndarray:
    """The least objective known for each replicate."""
    known = ours.objective.copy()
    known[: len(theirs)] = np.minimum(known[: len(theirs)], [value for value, _ in theirs])
    from_theirs = np.array([theta for _, theta in theirs])
    again = solve(LAW.predict, x, y, from_theirs, weights[: len(theirs)], max_iterations=1000).objective
    known[: len(theirs)] = np.minimum(known[: len(theirs)], again)
    beside = ours.theta + 0.02 * np.random.default_rng(1).normal(size=ours.theta.shape)
    return np.minimum(known, solve(LAW.predict, x, y, beside, weights, max_iterations=1000).objective)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=GOLDEN)
    parser.add_argument("--replicates", type=int, default=4000)
    parser.add_argument("--scipy", type=int, default=400, help="replicates for SciPy's loop")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    runs = read_runs(arguments.runs, LAW.needed)
    record = {"benchmark": "fit_speed", **measure(runs, arguments.replicates, arguments.scipy),
              "cores": os.cpu_count(), "load_average": os.getloadavg()[0],
              "versions": {"jax": jax.__version__, "numpy": np.__version__, "scipy": scipy.__version__}}
    print(json.dumps(record, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
