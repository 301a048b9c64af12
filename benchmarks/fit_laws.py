"""Every law fitted from a blind start: how long it takes, and whether a much longer search finds anything better.

    python3 benchmarks/fit_laws.py --json benchmarks/results/fit_laws_cpu.json

For each law a file of 240 rows (60 mixtures; 350 of curves) is made from published coefficients, with 0.3% noise, and
read as `maxlm fit` reads it. The record has the seconds of the point fit in a process that has compiled it
(`fit`), of the first point fit of a process with JAX's persistent cache empty and full (`first`, `first_cached`;
imports are not in them), of 4,000 bootstrap replicates, and of all of `maxlm fit`'s analysis; and `gap`, the objective
over the least of the longer search, less 1: every start of the grid and eight copies of it with normal noise of 0.5,
2,000 iterations (laws fitted in stages have none).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import jax
import numpy as np

from maxlm.scaling import fit
from maxlm.scaling.analysis import analyse
from maxlm.scaling.command import read_for
from maxlm.scaling.laws import LAWS
from maxlm.scaling.mixing import FORMS
from maxlm.scaling.uncertainty import resampled_weights
from tests.scaling.cases import CASES, columns_of
from tests.scaling.ladders import chinchilla_loss, ladder, noisy, write_csv

NAMES = (*LAWS, *FORMS)
COPIES, SPREAD, LONG = 8, 0.5, 2000
MIXTURE = np.array([0.4, 1.1, -0.7, 0.2])  # t of the exponential law, and w - 2 of the linear one


def write_data(name: str, path: Path) -> None:
    if name in FORMS:
        shares = np.random.default_rng(0).dirichlet(np.full(MIXTURE.size, 0.7), 60)
        loss = shares @ (2 + MIXTURE) if name == "mixture-linear" else 1.9 + np.exp(shares @ MIXTURE)
        columns = {f"share_{i}": shares[:, i] for i in range(MIXTURE.size)}
    elif name == "envelope":
        params, tokens = np.repeat(np.geomspace(1e7, 1e10, 14), 25), np.tile(np.geomspace(2e8, 3e11, 25), 14)
        loss, columns = chinchilla_loss(params, tokens), {"params": params, "tokens": tokens, "run": params}
    else:
        params, tokens = ladder(12, 20, last=1e21)
        columns, _ = columns_of(name if name in CASES else "chinchilla", params, tokens)
        loss = columns.pop(LAWS[name].target)
        columns.pop("loss", None)  # all one, where something else is predicted
    columns[LAWS[name].target if name in LAWS else "loss"] = noisy(loss)
    write_csv(path, **{column: values.tolist() for column, values in columns.items()})


def seconds(work) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def first_fit(name: str, path: Path, cache: Path) -> float:
    """Seconds of the first point fit of a new process."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache),
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}  # as `maxlm fit` has it
    command = [sys.executable, __file__, "--first", name, str(path)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def longer_search(fitted: fit.Fitted, runs) -> float | None:
    law = fitted.law
    if law.estimate:
        return None
    x, y = fitted.inputs(runs.columns), fitted.target(runs.columns[law.target])
    grid = law.starts(max(float(np.exp(np.median(y))), 1.01))
    noise = SPREAD * np.random.default_rng(0).standard_normal((COPIES, *grid.shape))
    starts = np.concatenate([grid, *(grid + noise)])
    found = fit.solve_law(law, x, y, starts, None, max_iterations=LONG)
    unit = np.exp(2 * fitted.centre["target"]) if law.least_squares else 1.0
    return float(fitted.objective / min(fitted.objective, found.objective.min() * unit) - 1)


def measure(name: str, folder: Path, replicates: int) -> dict[str, object]:
    path = folder / f"{name}.csv"
    write_data(name, path)
    cold, cached = (first_fit(name, path, folder / f"cache-{name}") for _ in range(2))
    law, runs = read_for(name, path, "", "")
    fit.point_fit(law, runs)
    times = [seconds(lambda: fit.point_fit(law, runs)) for _ in range(3)]
    fitted = times[0][1]
    weights = resampled_weights(runs.cluster, replicates, np.random.default_rng(0))
    fit.refit(fitted, runs, weights[:100])
    bootstrap, _ = seconds(lambda: fit.refit(fitted, runs, weights))
    whole, _ = seconds(lambda: analyse(law, runs, replicates=replicates))
    return {"law": name, "rows": len(runs), "parameters": law.num_parameters, "starts": fitted.num_starts,
            "starts_at_optimum": fitted.starts_at_optimum, "gap": longer_search(fitted, runs),
            "seconds": {"fit": min(t for t, _ in times), "first": cold, "first_cached": cached,
                        "bootstrap": bootstrap, "analysis": whole}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--laws", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--replicates", type=int, default=4000)
    parser.add_argument("--first", nargs=2, metavar=("LAW", "FILE"), help="times one first fit (a process of its own)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.first:
        law, runs = read_for(arguments.first[0], Path(arguments.first[1]), "", "")
        print(seconds(lambda: fit.point_fit(law, runs))[0])
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.laws:
            rows.append({**measure(name, Path(folder), arguments.replicates), "load_average": os.getloadavg()[0]})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        record = {"benchmark": "fit_laws", "replicates": arguments.replicates, "cores": os.cpu_count(),
                  "versions": {"jax": jax.__version__, "numpy": np.__version__}, "laws": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
