"""The published Chinchilla data from a blind start: the optimum, its intervals, and what may not change the answer."""

import csv

import numpy as np
import pytest

from maxlm.scaling.fit import flops_per_param_token, point_fit
from maxlm.scaling.laws import find_law
from maxlm.scaling.runs import read_runs
from maxlm.scaling.uncertainty import bootstrap, intervals
from tests.scaling.ladders import GADRE, GOLDEN

LAW = find_law("chinchilla")
OBJECTIVE = 0.001018274018


def fit(path=GOLDEN, where="excluded_outlier==0", renamed=None):
    runs = read_runs(path, LAW.needed, renamed, where)
    return point_fit(LAW, runs), runs


@pytest.fixture(scope="module")
def published():
    return fit()


def expect(values, wanted):
    for name, (value, tolerance) in wanted.items():
        assert abs(values[name] - value) <= tolerance, (name, values[name], value)


PARAMETERS = {"E": (1.81722, 5e-4), "A": (477.8, 2), "B": (2143, 15), "alpha": (0.34731, 5e-4), "beta": (0.36717, 5e-4),
              "a": (0.51390, 5e-4)}


def test_the_optimum_of_240_rows(published):
    fitted, _ = published
    assert OBJECTIVE * (1 - 1e-6) < fitted.objective < OBJECTIVE * (1 + 1e-6)
    assert fitted.starts_at_optimum > 0.9 * fitted.num_starts
    expect(fitted.natural(), PARAMETERS)


def test_the_optimum_of_all_rows():
    fitted, _ = fit(where="")
    assert abs(fitted.objective / 0.001826011 - 1) < 1e-6
    expect(fitted.natural(), {"E": (1.89134, 5e-4), "alpha": (0.34931, 5e-4), "beta": (0.45305, 5e-4)})


def test_the_frontier(published):
    fitted, runs = published
    best = fitted.frontier([5.76e23], flops_per_param_token(runs))
    assert abs(best["params"][0] / 7.32e10 - 1) < 0.005 and abs(best["tokens"][0] / 1.312e12 - 1) < 0.005


@pytest.mark.slow
def test_the_bootstrap(published):
    fitted, runs = published
    table = intervals(fitted.natural, bootstrap(fitted, runs, 4000, seed=0), 0.95)
    for name, sd in {"A": 121, "B": 1338, "E": 0.0257, "alpha": 0.0151, "beta": 0.0207}.items():
        assert abs(table[name]["row_sd"] / sd - 1) < 0.1, name
    published_ends = {"E": (1.770, 1.870), "alpha": (0.317, 0.372), "beta": (0.332, 0.415), "a": (0.4805, 0.5571)}
    for name, ends in published_ends.items():
        assert np.allclose(table[name]["interval"], ends, atol=0.004, rtol=0), (name, table[name]["interval"])


@pytest.mark.parametrize(("family", "tokens_ratio", "errors"), [
    ("rpj", 640, {"open_lm_1b": 0.00710, "open_lm_7b": 0.00732}),
    ("c4_original", 20, {"open_lm_7b": -0.04295}),
    ("rw_original", 20, {"open_lm_7b": -0.01619}),
])
def test_over_training_predicts_as_published(family, tokens_ratio, errors):
    """Gadre et al. 2024: fitted to five small runs (four sizes at M = 20, the smallest at M = 320 too)."""
    law = find_law("overtraining")
    runs = read_runs(GADRE, law.needed, {"loss": "loss_c4_val"}, f"train_set=={family}")
    large = np.char.startswith(runs.cells["model"], "open_lm")
    ratio = (runs.columns["tokens"] / runs.columns["params"]).round()
    smallest = runs.columns["params"] < 2e7
    fitted = point_fit(law, runs.take(~large & ((ratio == 20) | smallest & (ratio == 320))))
    for model, wanted in errors.items():
        at = np.flatnonzero((runs.cells["model"] == model) & (ratio == (20 if model == "open_lm_7b" else tokens_ratio)))
        error = np.exp(fitted.log_loss(runs.columns)[at[0]]) / runs.columns["loss"][at[0]] - 1
        assert abs(error - wanted) < 2e-5, (model, error)


def rewritten(path, change, keep=lambda i: True):
    """The 240 rows in a new file: `change(row)` each, those for which `keep(index)` holds."""
    with open(GOLDEN) as file:
        rows = [row for row in csv.DictReader(file) if row["excluded_outlier"] == "0"]
    rows = [change(row) for i, row in enumerate(rows) if keep(i)]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path, rows


def test_neither_order_nor_names_matter(published, tmp_path):
    path, rows = rewritten(tmp_path / "a.csv", lambda r: {"val": r["loss"], "D": r["tokens"], "N": r["params"]})
    order = np.random.default_rng(0).permutation(len(rows)) + 1
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(lines[i] for i in order)]))
    fitted, _ = fit(path, "", {"params": "N", "tokens": "D", "loss": "val"})
    for name, value in published[0].natural().items():
        assert abs(fitted.natural()[name] / value - 1) < 1e-5


def test_units_only_move_the_coefficients(published, tmp_path):
    path, _ = rewritten(tmp_path / "a.csv", lambda r: {
        "params": float(r["params"]) / 1e6, "tokens": float(r["tokens"]) / 1e9, "loss": float(r["loss"]) / np.log(2)})
    found, wanted = fit(path, "")[0].natural(), published[0].natural()
    scale = {"E": 1 / np.log(2), "A": 1e-6 ** wanted["alpha"] / np.log(2), "B": 1e-9 ** wanted["beta"] / np.log(2)}
    for name, value in wanted.items():
        assert abs(found[name] / (value * scale.get(name, 1)) - 1) < 1e-4, name


def test_copies_of_rows_count_once(published, tmp_path):
    path, _ = rewritten(tmp_path / "a.csv", dict)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, *lines[1:25]]))
    fitted, runs = fit(path, "")
    assert fitted.objective == published[0].objective
    assert len(runs) == 240
    assert runs.notes == ("24 of 264 rows are copies of another row in every column and were left out",)


def test_a_tenth_dropped_stays_near(published, tmp_path):
    path, _ = rewritten(tmp_path / "a.csv", dict, keep=lambda i: i % 10 != 3)
    found = fit(path, "")[0].natural()
    whole = published[0].natural()
    expect(found, {"E": (whole["E"], 0.03), "alpha": (whole["alpha"], 0.02), "beta": (whole["beta"], 0.03)})
