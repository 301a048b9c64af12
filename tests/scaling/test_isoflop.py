"""Approach 2: exact parabolas give back what they were made of; noisy ladders of a known law give its exponent."""

import numpy as np
import pytest

from maxlm.scaling.budgets import budgets
from maxlm.scaling.fit import point_fit
from maxlm.scaling.laws import find_law
from maxlm.scaling.runs import read_runs
from maxlm.schema import ConfigError
from tests.scaling.ladders import TRUTH, chinchilla_loss, ladder, noisy, write_csv

LAW = find_law("approach2")


def runs_of(path, params, tokens, loss):
    return read_runs(write_csv(path, params=params.tolist(), tokens=tokens.tolist(), loss=loss.tolist()), LAW.needed)


def test_parabolas_give_back_their_minima(tmp_path):
    params, tokens = ladder(6, 7, 1e18, 1e21)
    product = params * tokens
    best, least = 0.2 * product**0.47, 1.7 + 900 / product**0.17
    found = point_fit(LAW, runs_of(tmp_path / "runs.csv", params, tokens, least + 0.04 * np.log(params / best) ** 2))
    wanted = {"E": 1.7, "A": 900, "gamma": 0.17, "a": 0.47, "b": 0.53, "N_1": 0.2}
    for name, value in wanted.items():
        assert abs(found.natural()[name] / value - 1) < 1e-4, (name, found.natural()[name])
    assert np.isclose(found.frontier([6e21], 6.0)["params"][0], 0.2 * 1e21**0.47, rtol=1e-4)


def test_a_ladder_of_a_known_law(tmp_path):
    params, tokens = ladder(6, 9, 1e18, 1e21)
    loss = noisy(chinchilla_loss(params, tokens), sd=0.001)
    found = point_fit(LAW, runs_of(tmp_path / "runs.csv", params, tokens, loss)).natural()
    assert abs(found["a"] - TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])) < 0.01


def test_a_budget_without_a_minimum_is_left_out(tmp_path):
    params, tokens = ladder(6, 7, 1e18, 1e21)
    loss = chinchilla_loss(params, tokens)
    whole = point_fit(LAW, runs_of(tmp_path / "a.csv", params, tokens, loss)).natural()
    loss[:7] = np.linspace(5, 4, 7)
    left = point_fit(LAW, runs_of(tmp_path / "b.csv", params, tokens, loss)).natural()
    assert abs(left["a"] - whole["a"]) < 0.01


def test_three_budgets_are_too_few(tmp_path):
    params, tokens = ladder(3, 7)
    with pytest.raises(ConfigError, match="needs 4 budgets of at least 4 model sizes: these runs have 3"):
        point_fit(LAW, runs_of(tmp_path / "runs.csv", params, tokens, chinchilla_loss(params, tokens)))


def test_budgets_are_told_apart_by_gaps():
    flops = np.array([1e19, 1e18, 1.1e19, 1.02e18, 3e20])
    assert budgets(flops).tolist() == [1, 0, 1, 0, 2]
    assert np.bincount(budgets(np.geomspace(1e18, 1e20, 40))).tolist() == [5] * 8
