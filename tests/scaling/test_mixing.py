"""Mixing laws give back the weights that their data were made with; shares must be shares."""

import json

import numpy as np
import pytest

import maxlm.cli
from maxlm.scaling.command import read_for
from maxlm.scaling.fit import point_fit
from maxlm.scaling.laws import find_law
from maxlm.scaling.mixing import best_shares
from maxlm.schema import ConfigError
from tests.scaling.ladders import noisy, write_csv

W, T, C = np.array([2.9, 3.4, 2.2]), np.array([0.4, 1.1, -0.7]), 1.9
NAMES = ("share_web", "share_books", "share_code")


def shares(count=30, seed=0):
    drawn = np.random.default_rng(seed).dirichlet([0.7, 0.7, 0.7], count)
    drawn[0] = (1, 0, 0)
    drawn[1] = (0, 0.5, 0.5)
    return drawn


def table(path, loss, drawn):
    return write_csv(path, **{name: drawn[:, i].tolist() for i, name in enumerate(NAMES)}, loss=loss.tolist())


@pytest.mark.parametrize(("law", "make", "truth"), [
    ("mixture-linear", lambda r: r @ W, {"w_web": 2.9, "w_books": 3.4, "w_code": 2.2}),
    ("mixture-exponential", lambda r: C + np.exp(r @ T), {"c": 1.9, "t_web": 0.4, "t_books": 1.1, "t_code": -0.7}),
])
def test_a_mixing_law_recovers_its_parameters(law, make, truth, tmp_path):
    found_law, runs = read_for(law, table(tmp_path / "runs.csv", make(shares()), shares()), "", "")
    found = point_fit(found_law, runs).natural()
    for name, value in truth.items():
        assert abs(found[name] - value) < 1e-4, (name, found[name])


def test_a_mixture_fit_predicts_unseen_mixtures(tmp_path, monkeypatch):
    monkeypatch.setattr(maxlm.cli, "_start_jax", lambda: None)
    drawn = shares(40)
    path = table(tmp_path / "runs.csv", noisy(C + np.exp(drawn @ T), sd=0.002), drawn)
    code = maxlm.cli.main(["fit", str(path), "--law", "mixture-exponential", "--out", str(tmp_path / "out"),
                           "--bootstrap", "200", "--holdout", "share_code>0.6"])
    found = json.loads((tmp_path / "out" / "fit.json").read_text())
    low, high = found["interval"]["t_books"]
    assert code == 0 and low < T[1] < high and found["holdout"]["biased"] is False
    assert "L = c + exp" in (tmp_path / "out" / "report.md").read_text()


def test_shares_that_are_none(tmp_path):
    drawn = shares()
    loss = drawn @ W
    with pytest.raises(ConfigError, match="must sum to 1"):
        point_fit(*read_for("mixture-linear", table(tmp_path / "a.csv", loss, 1.1 * drawn), "", ""))
    with pytest.raises(ConfigError, match="of 0 or more"):
        read_for("mixture-linear", table(tmp_path / "b.csv", loss, drawn - 0.1), "", "")
    drawn[:, 1] = drawn[:, 2] = (1 - drawn[:, 0]) / 2
    with pytest.raises(ConfigError, match="vary in 2 directions only"):
        point_fit(*read_for("mixture-linear", table(tmp_path / "c.csv", loss, drawn), "", ""))
    with pytest.raises(ConfigError, match="two or more columns share_NAME"):
        find_law("mixture-linear", ["loss", "params"])
    renamed = table(tmp_path / "d.csv", loss, shares())
    text = renamed.read_text().replace("share_web", "web")
    renamed.write_text(text)
    law, _ = read_for("mixture-linear", renamed, "share_web=web", "")
    assert law.inputs == tuple(sorted(NAMES))


def test_the_best_mixture_for_several_losses(tmp_path, capsys, monkeypatch):
    """Against a grid over all mixtures of the true laws."""
    monkeypatch.setattr(maxlm.cli, "_start_jax", lambda: None)
    drawn, slopes, weights = shares(60), np.array([[-1.0, 0.5, 0.3], [0.4, -1.2, 0.1]]), np.array([0.6, 0.4])
    losses = C + np.exp(drawn @ slopes.T)
    random = np.random.default_rng(1)
    made = {f"loss_{name}": (losses[:, j] * np.exp(0.002 * random.standard_normal(60))).tolist()
            for j, name in enumerate(("web", "books"))}
    path = write_csv(tmp_path / "runs.csv", **{name: drawn[:, i].tolist() for i, name in enumerate(NAMES)}, **made)
    words = ["mix", str(path), "--out", str(tmp_path / "out"), "--bootstrap", "200", "--losses"]
    assert maxlm.cli.main([*words, "loss_web=0.6,loss_books=0.4"]) == 0
    found = json.loads((tmp_path / "out" / "mixture.json").read_text())

    first, second = np.meshgrid(np.linspace(0, 1, 201), np.linspace(0, 1, 201))
    grid = np.stack([first, second, 1 - first - second], axis=-1).reshape(-1, 3)
    grid = grid[grid[:, 2] >= -1e-12]
    true = np.exp(grid @ slopes.T) @ weights
    for i, name in enumerate(NAMES):
        low, high = found["shares"][name]["interval"]
        assert low - 0.005 <= grid[true.argmin(), i] <= high + 0.005, name
    assert abs(found["loss"]["value"] - C - true.min()) < 0.002

    for losses, message in (("loss_web", "must read COLUMN=WEIGHT"), ("loss_web=0", "with a weight above 0"),
                            ("loss_wep=1", "no column 'loss_wep'; did you mean 'loss_web'?")):
        assert maxlm.cli.main([*words, losses]) == 2 and message in capsys.readouterr().err


def test_the_best_mixture_is_where_no_share_can_gain():
    slopes = np.random.default_rng(0).standard_normal((50, 3, 5))
    found = best_shares(slopes, np.array([0.5, 0.3, 0.2]))
    parts = np.array([0.5, 0.3, 0.2]) * np.exp(np.einsum("rjk,rk->rj", slopes, found))
    gradient = np.einsum("rj,rjk->rk", parts, slopes)
    assert np.allclose(found.sum(1), 1) and (found >= 0).all()
    assert (np.einsum("rk,rk->r", gradient, found) - gradient.min(1)).max() < 1e-6
