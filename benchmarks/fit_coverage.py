"""How often stated intervals hold the truth, on ladders simulated from known laws.

    python3 benchmarks/fit_coverage.py --json benchmarks/results/fit_coverage.json      (half an hour on one core)
    python3 benchmarks/fit_coverage.py --unseen --rows 20 30 48 --weights gamma         (other laws, noises and ladders)

For each of three Chinchilla laws, three shapes of noise and three sizes of ladder, `--trials` data sets are made,
fitted from a blind start and bootstrapped as `maxlm fit` does; the record has the share of trials whose 95% interval
holds the true E, alpha, beta, a, N*(100 C) and L*(100 C), C being the largest budget. A share of 200 trials has a
standard error of 1.5%.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import jax
import numpy as np

from maxlm.scaling.fit import Fitted, fit_unchecked, refit
from maxlm.scaling.laws import find_law
from maxlm.scaling.runs import Runs
from maxlm.scaling.uncertainty import gamma_weights, percentile, resampled_weights

LEVEL = 0.95
LAW = find_law("chinchilla")
TRUTHS = {
    "hoffmann": {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.339, "beta": 0.285},
    "besiroglu": {"E": 1.8172, "A": 477.8, "B": 2143.0, "alpha": 0.3473, "beta": 0.3672},
    "steep": {"E": 2.0, "A": 2000.0, "B": 8000.0, "alpha": 0.45, "beta": 0.42},
}
# Rows: budgets, sizes, largest budget.
LADDERS = {20: (4, 5, 1e20), 24: (4, 6, 1e20), 30: (5, 6, 3e20), 35: (5, 7, 1e20), 48: (6, 8, 1e20),
           240: (12, 20, 1e21)}
NOISES = {
    "normal": lambda random, depth: 0.005 * random.standard_normal(depth.size),
    "student3": lambda random, depth: 0.004 * random.standard_t(3, depth.size),
    "falling": lambda random, depth: 0.012 * np.exp(-1.5 * depth) * random.standard_normal(depth.size),
}
# Nothing of the method was chosen on these.
UNSEEN_TRUTHS = {
    "unseen1": {"E": 1.5, "A": 150.0, "B": 900.0, "alpha": 0.28, "beta": 0.33},
    "unseen2": {"E": 2.4, "A": 6000.0, "B": 1500.0, "alpha": 0.5, "beta": 0.36},
    "unseen3": {"E": 1.0, "A": 60.0, "B": 300.0, "alpha": 0.24, "beta": 0.27},
}
UNSEEN_NOISES = {
    "laplace": lambda random, depth: 0.005 * random.laplace(size=depth.size) / np.sqrt(2),
    "outliers": lambda random, depth: 0.004 * random.standard_normal(depth.size)
    * np.where(random.random(depth.size) < 0.08, 5, 1),
    "rising": lambda random, depth: 0.003 * np.exp(1.2 * depth) * random.standard_normal(depth.size),
    "falling2": lambda random, depth: 0.01 * np.exp(-1.2 * depth) * random.standard_normal(depth.size),
}

WEIGHTS = {"resampled": resampled_weights, "gamma": gamma_weights}


def ladder(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(params, tokens) [rows] of an isoFLOP ladder from 1e18 FLOPs, C = 6 N D."""
    count, sizes, last = LADDERS[rows]
    flops = np.repeat(np.geomspace(1e18, last, count), sizes)
    params = 0.09 * flops**0.5 * np.tile(np.geomspace(0.2, 5, sizes), count)
    return params, flops / 6 / params


def simulate(truth: dict[str, float], noise, rows: int, random: np.random.Generator) -> Runs:
    params, tokens = ladder(rows)
    flops = 6 * params * tokens
    depth = np.log(flops / flops.min()) / np.log(flops.max() / flops.min())
    loss = truth["E"] + truth["A"] / params ** truth["alpha"] + truth["B"] / tokens ** truth["beta"]
    columns = {"params": params, "tokens": tokens, "flops": flops, "loss": loss * np.exp(noise(random, depth))}
    return Runs(columns, {}, np.arange(rows), np.arange(rows), "simulated", "")


def quantities(fitted: Fitted, theta: np.ndarray, flops: float) -> dict[str, np.ndarray]:
    natural = fitted.natural(theta)
    ahead = fitted.frontier([flops], 6.0, theta)
    return {**{name: natural[name] for name in ("E", "alpha", "beta", "a")},
            "N*(100C)": ahead["params"][..., 0], "L*(100C)": ahead["loss"][..., 0]}


def true_values(truth: dict[str, float], flops: float) -> dict[str, float]:
    """Hoffmann et al. 2022, equation 4."""
    alpha, beta = truth["alpha"], truth["beta"]
    a = beta / (alpha + beta)
    scale = (alpha * truth["A"] / (beta * truth["B"])) ** (1 / (alpha + beta))
    params = scale * (flops / 6) ** a
    loss = truth["E"] + truth["A"] / params**alpha + truth["B"] / (flops / 6 / params) ** beta
    return {"E": truth["E"], "alpha": alpha, "beta": beta, "a": a, "N*(100C)": params, "L*(100C)": loss}


def cover(truth, noise, rows: int, trials: int, replicates: int, seed: int,
          weights: Sequence[str]) -> dict[str, dict[str, float]]:
    """{how replicates are weighted: {quantity: share of trials covered}}."""
    random = np.random.default_rng(seed)
    methods = {name: WEIGHTS[name] for name in weights}
    hits: dict[str, dict[str, list[bool]]] = {}
    for _ in range(trials):
        runs = simulate(truth, noise, rows, random)
        flops = 100 * runs.columns["flops"].max()
        true = true_values(truth, flops)
        fitted = fit_unchecked(LAW, runs)
        for method, draw in methods.items():
            found = quantities(fitted, refit(fitted, runs, draw(runs.cluster, replicates, random)), flops)
            for name, values in found.items():
                low, high = percentile(values, LEVEL)
                hits.setdefault(method, {}).setdefault(name, []).append(low <= true[name] <= high)
    return {method: {name: float(np.mean(h)) for name, h in table.items()} for method, table in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[24, 35, 240], choices=list(LADDERS))
    parser.add_argument("--unseen", action="store_true", help="laws and noises that nothing was chosen on")
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=list(WEIGHTS))
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--replicates", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cells = []
    truths, noises = (UNSEEN_TRUTHS, UNSEEN_NOISES) if arguments.unseen else (TRUTHS, NOISES)
    for rows, (law, truth), (noise, draw) in itertools.product(arguments.rows, truths.items(), noises.items()):
        start = time.process_time()
        seed = arguments.seed + len(cells)
        coverage = cover(truth, draw, rows, arguments.trials, arguments.replicates, seed, arguments.weights)
        cells.append({"rows": rows, "law": law, "noise": noise, "trials": arguments.trials, "coverage": coverage,
                      "cpu_seconds": time.process_time() - start, "seed": seed})
        print(rows, law, noise, *(f"{m}: " + " ".join(f"{n} {v:.3f}" for n, v in t.items())
                                  for m, t in coverage.items()), flush=True)
    if arguments.json:
        record = {"benchmark": "fit_coverage", "level": LEVEL, "replicates": arguments.replicates,
                  "versions": {"jax": jax.__version__, "numpy": np.__version__}, "cells": cells}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
