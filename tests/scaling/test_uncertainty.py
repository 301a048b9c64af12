"""Intervals: the arithmetic of each, whose runs are drawn together, and how often they cover the truth."""

import numpy as np
import pytest

from maxlm.scaling.diagnostics import diagnose
from maxlm.scaling.fit import point_fit
from maxlm.scaling.holdout import seed_noise
from maxlm.scaling.laws import find_law
from maxlm.scaling.runs import read_runs
from maxlm.scaling.uncertainty import (
    bca,
    bootstrap,
    gamma_weights,
    intervals,
    percentile,
    profile,
    resampled_weights,
    student_quantile,
)
from tests.scaling.ladders import TRUTH, chinchilla_loss, ladder, noisy, simulated, write_csv

LAW = find_law("chinchilla")


def test_rows_of_one_run_share_a_weight():
    cluster = np.array([0, 0, 1, 2, 2, 2])
    for draw in (gamma_weights, resampled_weights):
        weights = draw(cluster, 50, np.random.default_rng(0))
        assert (weights[:, 0] == weights[:, 1]).all() and np.ptp(weights[:, 3:], axis=1).max() == 0
        assert (weights[:, 0] != weights[:, 2]).any()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()


def test_percentile_and_bca_of_a_normal_sample_agree():
    values = np.random.default_rng(0).normal(size=20_000)
    assert np.allclose(percentile(values, 0.95), [-1.96, 1.96], atol=0.06)
    symmetric = np.linspace(-1, 1, 21)
    assert np.allclose(bca(values, 0.0, symmetric, 0.95), percentile(values, 0.95), atol=0.05)
    assert bca(values, 0.5, symmetric, 0.95)[0] > percentile(values, 0.95)[0] + 0.5


@pytest.mark.parametrize(("freedom", "wanted"), [(19, 2.0930), (30, 2.0423), (235, 1.9701)])
def test_student_quantiles(freedom, wanted):
    assert abs(student_quantile(0.975, freedom) - wanted) < 2e-4


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    runs = read_runs(simulated(tmp_path_factory.mktemp("runs") / "runs.csv"), LAW.needed)
    found = point_fit(LAW, runs)
    return found, runs, bootstrap(found, runs, 400, seed=0)


def test_the_profile_is_a_check_of_the_bootstrap(fitted):
    found, runs, replicates = fitted
    low, high = percentile(replicates.stated[:, 3], 0.95)
    ends = profile(found, runs, 3, (high - low) / 4, 0.95)
    assert ends[0] < found.theta[3] < ends[1]
    assert 0.5 < (ends[1] - ends[0]) / (high - low) < 2


def test_small_ladders_do_not_lose_runs(fitted):
    found, _, replicates = fitted
    assert replicates.method.startswith("gamma")
    widths = [np.subtract(*percentile(t[:, 3], 0.95)) for t in (replicates.rows, replicates.stated)]
    assert widths[0] < widths[1] < 0, "resampled rows are wider"


def test_seed_noise_is_the_spread_of_repeated_runs(tmp_path):
    params, tokens = (np.repeat(column, 4) for column in ladder())
    loss = noisy(chinchilla_loss(params, tokens), sd=0.004)
    path = write_csv(tmp_path / "runs.csv", params=params.tolist(), tokens=tokens.tolist(), loss=loss.tolist())
    sd, freedom = seed_noise(read_runs(path, LAW.needed), LAW)
    assert freedom == 105 and abs(sd / 0.004 - 1) < 0.2


def test_a_parameter_that_the_data_do_not_determine_is_named(tmp_path):
    """Where tokens hardly matter, beta can be anything: the report must say so rather than give a number."""
    params, tokens = ladder()
    loss = noisy(chinchilla_loss(params, tokens, {**TRUTH, "B": 20.0, "beta": 0.37}), sd=0.01)
    path = write_csv(tmp_path / "runs.csv", params=params.tolist(), tokens=tokens.tolist(), loss=loss.tolist())
    runs = read_runs(path, LAW.needed)
    found = point_fit(LAW, runs)
    replicates = bootstrap(found, runs, 400, seed=0)
    table = intervals(found.natural, replicates, 0.95)
    warnings = diagnose(found, runs, replicates, {name: row["interval"] for name, row in table.items()}).warnings
    assert any("do not determine" in line and "beta" in line for line in warnings), warnings


def test_a_determined_fit_has_no_warning(fitted):
    found, runs, replicates = fitted
    table = intervals(found.natural, replicates, 0.95)
    assert diagnose(found, runs, replicates, {name: row["interval"] for name, row in table.items()}).warnings == []


def test_a_cost_that_is_not_proportional_to_parameters_is_told(tmp_path):
    params, tokens = ladder()
    flops = 6 * params * tokens * np.linspace(1, 1.5, params.size)
    path = write_csv(tmp_path / "runs.csv", params=params.tolist(), tokens=tokens.tolist(), flops=flops.tolist(),
                     loss=noisy(chinchilla_loss(params, tokens)).tolist())
    runs = read_runs(path, LAW.needed)
    found = point_fit(LAW, runs)
    warnings = diagnose(found, runs, bootstrap(found, runs, 100, seed=0), {}).warnings
    assert any("ranges from 6 to 9" in line for line in warnings), warnings
