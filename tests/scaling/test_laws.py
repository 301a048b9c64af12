"""Every law recovers the parameters that its data were made with, in the units of the data."""

import numpy as np
import pytest

from maxlm.scaling.command import read_for
from maxlm.scaling.fit import check_design, flops_per_param_token, point_fit
from maxlm.scaling.laws import LAWS, find_law
from maxlm.scaling.runs import read_runs
from maxlm.scaling.uncertainty import bootstrap
from maxlm.schema import ConfigError
from tests.scaling.cases import CASES, SLOW, data_constrained_loss, runs_of, task_loss
from tests.scaling.ladders import chinchilla_loss, ladder, noisy, simulated, write_csv


def test_every_law_has_a_case():
    assert CASES.keys() | {"isoflop", "envelope"} == LAWS.keys()  # test_isoflop.py and test_envelope.py have those


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_a_law_recovers_its_parameters(name, tmp_path):
    runs, truth = runs_of(name, tmp_path / "runs.csv")
    fitted = point_fit(LAWS[name], runs)
    for parameter, value in truth.items():
        parameter = {"d_": "d", "lam": "lambda"}.get(parameter, parameter)  # a taken name, and Python's own
        assert abs(fitted.natural()[parameter] / value - 1) < 1e-3, (parameter, fitted.natural()[parameter])
    assert np.abs(fitted.residuals(runs)).max() < 1e-5


@pytest.mark.parametrize("name", ["kaplan", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "kaplan")])
def test_neither_order_nor_units_nor_names_nor_copies_matter(name, tmp_path):
    runs, _ = runs_of(name, tmp_path / "runs.csv")
    law, random = LAWS[name], np.random.default_rng(3)
    columns = {column: runs.columns[column] for column in law.needed}
    columns[law.target] = columns[law.target] * np.exp(0.003 * random.standard_normal(len(runs)))
    write_csv(tmp_path / "plain.csv", **{column: values.tolist() for column, values in columns.items()})
    plain = point_fit(law, read_for(name, tmp_path / "plain.csv", "", "")[1])
    rows = random.permutation(np.concatenate([np.arange(len(runs)), random.integers(len(runs), size=8)]))
    unit = {"params": 1e-6, "active_params": 1e-6, "tokens": 1e-9, "unique_tokens": 1e-9, "flops": 1e-20}
    other = {f"their {c}": (values * unit.get(c, 1))[rows].tolist() for c, values in columns.items()}
    write_csv(tmp_path / "other.csv", **other)
    found = point_fit(law, read_for(name, tmp_path / "other.csv", ",".join(f"{c}=their {c}" for c in columns), "")[1])
    assert np.allclose(found.theta, plain.theta, rtol=1e-5, atol=1e-6)
    assert abs(found.objective / plain.objective - 1) < 1e-6


def test_the_interval_of_a_chained_forecast_holds_the_errors_of_both_steps(tmp_path):
    """Noise in the task loss alone, and in the accuracy alone, each widen it."""
    law, target = LAWS["accuracy-chained"], {"params": np.array([1e11]), "tokens": np.array([2e12])}
    params, tokens = ladder()
    task = task_loss(params, tokens)
    widths = {}
    for name, sd in {"loss": (0.01, 0.0002), "accuracy": (0.0002, 0.01), "both": (0.01, 0.01)}.items():
        seen = noisy(task, sd=sd[0], seed=1)
        accuracy = noisy(0.25 + 0.7 / (1 + np.exp(5 * (seen - 1.1))), sd=sd[1], seed=2)
        path = write_csv(tmp_path / f"{name}.csv", params=params.tolist(), tokens=tokens.tolist(),
                         task_loss=seen.tolist(), accuracy=accuracy.tolist())
        runs = read_runs(path, law.needed)
        fitted = point_fit(law, runs)
        theta = bootstrap(fitted, runs, 200, seed=0).stated
        low, high = np.percentile(fitted.log_loss(target, theta), [2.5, 97.5])
        truth = np.log(0.25 + 0.7 / (1 + np.exp(5 * (task_loss(1e11, 2e12) - 1.1))))
        assert low - 0.05 < truth < high + 0.05
        widths[name] = high - low
    assert widths["both"] > max(widths["loss"], widths["accuracy"]) > 0


def test_the_frontier_is_where_the_loss_is_least(tmp_path):
    law = find_law("approach3")
    runs = read_runs(simulated(tmp_path / "runs.csv"), law.needed)
    fitted, flops = point_fit(law, runs), 1e22
    best = fitted.frontier([flops], flops_per_param_token(runs))
    p = fitted.natural()
    G = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))  # Hoffmann et al., equation 4
    assert np.isclose(best["params"][0], G * (flops / 6) ** p["a"], rtol=1e-5)
    assert np.isclose(best["loss"][0], chinchilla_loss(best["params"][0], best["tokens"][0], p), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data-constrained", "moe-granularity", "moe-sparsity"])
def test_the_frontier_of_a_law_of_more_inputs(name, tmp_path):
    """The third input is held as the fit says; among all divisions of a budget none is better in the true law."""
    runs, truth = runs_of(name, tmp_path / "runs.csv")
    fitted = point_fit(LAWS[name], runs)
    (held,) = fitted.held.values()
    per, flops = flops_per_param_token(runs, LAWS[name]), 1e22
    params = np.geomspace(1e7, 1e13, 200_001)
    tokens = flops / per / params
    if name == "data-constrained":
        loss = data_constrained_loss(params, tokens, np.minimum(held, tokens), **truth)
    elif name == "moe-granularity":
        t = truth
        loss = t["E"] + (t["g"] / held ** t["gamma"] + t["A"]) / params ** t["alpha"] + t["B"] / tokens ** t["beta"]
    else:
        t = truth
        loss = (t["E"] + t["A"] / params ** t["alpha"] + t["B"] / tokens ** t["beta"] + t["c"] / held ** t["lam"]
                + t["d_"] / (held ** t["delta"] * params ** t["gamma"]))
    best = fitted.frontier([flops], per)
    assert np.isclose(best["loss"][0], loss.min(), rtol=1e-5)
    assert np.isclose(best["params"][0], params[np.argmin(loss)], rtol=0.01)
    assert np.isclose(per * best["params"][0] * best["tokens"][0], flops)


@pytest.mark.parametrize(("rows", "words"), [
    (slice(0, 5), "needs at least 6 runs"),
    (slice(0, 7), "more than one budget"),
    (slice(3, 35, 7), "needs at least 6"),
])
def test_a_design_that_cannot_tell(rows, words, tmp_path):
    law = find_law("chinchilla")
    runs = read_runs(simulated(tmp_path / "runs.csv"), law.needed)
    keep = np.zeros(len(runs), bool)
    keep[rows] = True
    with pytest.raises(ConfigError, match=words):
        check_design(law, runs.take(keep))


def test_one_ratio_of_tokens_to_parameters(tmp_path):
    params = np.geomspace(1e7, 1e9, 12)
    path = write_csv(tmp_path / "runs.csv", params=params.tolist(), tokens=(20 * params).tolist(),
                     loss=chinchilla_loss(params, 20 * params).tolist())
    law = find_law("chinchilla")
    with pytest.raises(ConfigError, match="cannot tell params from tokens"):
        point_fit(law, read_runs(path, law.needed))


@pytest.mark.parametrize(("name", "change", "words"), [
    ("moe-sparsity", lambda c: {"active_params": c["params"] / 4}, "cannot tell params from active_params"),
    ("data-constrained", lambda c: {"unique_tokens": c["tokens"] / 4}, "vary unique_tokens at equal tokens"),
    ("moe-granularity", lambda c: {"granularity": 1e3 * c["params"] / c["tokens"]}, "the same product of powers"),
    ("step-learning-rate", lambda c: {"tokens": 20 * c["params"]}, "cannot tell params from tokens"),
    ("accuracy-chained", lambda c: {"tokens": 1e18 / c["params"]}, "cannot tell params from tokens"),
])
def test_inputs_that_follow_from_one_another(name, change, words, tmp_path):
    runs, _ = runs_of(name, tmp_path / "runs.csv")
    check_design(LAWS[name], runs)
    runs.columns.update(change(runs.columns))
    with pytest.raises(ConfigError, match=words):
        check_design(LAWS[name], runs)


def test_a_loss_that_rises_with_scale_is_refused(tmp_path):
    params, tokens = ladder()
    path = write_csv(tmp_path / "runs.csv", params=params.tolist(), tokens=tokens.tolist(),
                     loss=(2 + (tokens / 1e9) ** 0.2).tolist())
    law = find_law("chinchilla")
    with pytest.raises(ConfigError, match="from 0 to 10"):
        point_fit(law, read_runs(path, law.needed))


def test_a_loss_that_does_not_vary_is_refused(tmp_path):
    params, tokens = ladder()
    path = write_csv(tmp_path / "runs.csv", params=params.tolist(), tokens=tokens.tolist(), loss=[2.0] * params.size)
    law = find_law("chinchilla")
    with pytest.raises(ConfigError, match="every run has the same loss, 2"):
        point_fit(law, read_runs(path, law.needed))


def test_the_data_constrained_law_needs_repetition(tmp_path):
    params, tokens = ladder()
    law = find_law("data-constrained")
    for unique, words in ((tokens, "no run repeats"), (2 * tokens, "above tokens")):
        path = write_csv(tmp_path / "runs.csv", params=params.tolist(), tokens=tokens.tolist(),
                         unique_tokens=unique.tolist(), loss=chinchilla_loss(params, tokens).tolist())
        with pytest.raises(ConfigError, match=words):
            point_fit(law, read_runs(path, law.needed))


def test_active_parameters_are_part_of_all(tmp_path):
    params, tokens = ladder()
    path = write_csv(tmp_path / "runs.csv", params=params.tolist(), tokens=tokens.tolist(),
                     active_params=(params * np.linspace(0.5, 2, 35)).tolist(),
                     loss=chinchilla_loss(params, tokens).tolist())
    law = find_law("moe-sparsity")
    with pytest.raises(ConfigError, match="active_params is above params"):
        point_fit(law, read_runs(path, law.needed))


def test_an_unknown_law_names_those_there_are():
    with pytest.raises(ConfigError, match="chinchilla-tied"):
        find_law("chinchila")
