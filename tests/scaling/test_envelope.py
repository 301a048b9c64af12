"""Approach 1: the envelope of training curves of a known law has its exponent; and what is no set of curves."""

import json

import numpy as np
import pytest

import maxlm.cli
from maxlm.scaling.command import read_for
from maxlm.scaling.fit import point_fit
from maxlm.schema import ConfigError
from tests.scaling.ladders import TRUTH, chinchilla_loss, noisy, write_csv

A = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])


def curves(path, sizes=14, points=25, noise=0.001, seed=0):
    params = np.repeat(np.geomspace(1e7, 1e10, sizes), points)
    tokens = np.tile(np.geomspace(2e8, 3e11, points), sizes)
    loss = noisy(chinchilla_loss(params, tokens), sd=noise, seed=seed)
    names = [f"run{number}" for number in np.repeat(np.arange(sizes), points)]
    return write_csv(path, run=names, params=params.tolist(), tokens=tokens.tolist(), loss=loss.tolist())


def test_the_envelope_has_the_exponent_of_its_law(tmp_path):
    law, runs = read_for("approach1", curves(tmp_path / "curves.csv", noise=0), "", "")
    found = point_fit(law, runs)
    assert abs(found.natural()["a"] - A) < 0.02
    best = found.frontier([6e20], 6.0)
    scale = (TRUTH["alpha"] * TRUTH["A"] / (TRUTH["beta"] * TRUTH["B"])) ** (1 / (TRUTH["alpha"] + TRUTH["beta"]))
    assert np.isclose(best["params"][0], scale * 1e20**A, rtol=0.15)
    assert np.isclose(best["loss"][0], chinchilla_loss(best["params"][0], best["tokens"][0]), rtol=0.01)


def test_intervals_come_from_drawing_whole_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(maxlm.cli, "_start_jax", lambda: None)
    path = curves(tmp_path / "curves.csv")
    code = maxlm.cli.main(["fit", str(path), "--law", "envelope", "--out", str(tmp_path / "out"), "--bootstrap", "200"])
    found = json.loads((tmp_path / "out" / "fit.json").read_text())
    low, high = found["interval"]["a"]
    assert code == 0 and low < A < high and 0.001 < high - low < 0.3
    assert found["interval_method"] == "percentile, resampled runs" and found["bootstrap"]["independent_runs"] <= 14
    assert any("curves were read at" in note for note in found["notes"])


def test_rows_that_are_no_curves_are_refused(tmp_path):
    path = curves(tmp_path / "one.csv", points=1)
    with pytest.raises(ConfigError, match="reads training curves"):
        read_for("envelope", path, "", "")
    path = curves(tmp_path / "few.csv", sizes=4)
    law, runs = read_for("envelope", path, "", "")
    with pytest.raises(ConfigError, match="belongs to . model sizes"):
        point_fit(law, runs)
