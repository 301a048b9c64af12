"""`maxlm fit`: what it writes, and that bad input is one clear line and exit code 2 with nothing written."""

import json

import numpy as np
import pytest

import maxlm.cli
from maxlm.scaling.runs import read_runs
from tests.scaling.ladders import chinchilla_loss, ladder, noisy, simulated, write_csv


@pytest.fixture(autouse=True)
def no_cache_of_its_own(monkeypatch):
    monkeypatch.setattr(maxlm.cli, "_start_jax", lambda: None)


def fit(path, out, *words, law="chinchilla"):
    return maxlm.cli.main(["fit", str(path), "--law", law, "--out", str(out), "--bootstrap", "200", *words])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    path = simulated(folder / "runs.csv")
    patch = pytest.MonkeyPatch()
    patch.setattr(maxlm.cli, "_start_jax", lambda: None)
    assert fit(path, folder / "out", "--holdout", "flops>9e19", "--at-flops", "1e23") == 0
    patch.undo()
    return folder / "out"


def test_the_contract_of_fit_json(written):
    found = json.loads((written / "fit.json").read_text())
    assert found["law"] == "chinchilla" and found["level"] == 0.95 and found["n"] == 28
    assert found["params"].keys() == found["interval"].keys() == {"E", "A", "B", "alpha", "beta", "a"}
    for name, (low, high) in found["interval"].items():
        assert low < found["params"][name] < high
    assert found["holdout"]["n"] == 7 and found["holdout"]["condition"] == "flops>9e19"
    assert len(found["data_sha256"]) == 64
    assert [row["flops"] for row in found["frontier"]][-1] == 1e23
    assert found["frontier"][-1]["interval"]["params"][0] < found["frontier"][-1]["params"]


def test_the_report_can_be_read_alone(written):
    report = (written / "report.md").read_text()
    found = json.loads((written / "fit.json").read_text())
    equation = "L = E + A / N^alpha + B / D^beta"
    for word in (equation, "arXiv:2203.15556", found["data_sha256"], found["verdict"], "| alpha |"):
        assert word in report
    assert (written / "fit.png").read_bytes()[:4] == b"\x89PNG"


def test_rows_of_json_lines_are_the_same_runs(written, tmp_path):
    params, tokens = ladder()
    loss = noisy(chinchilla_loss(params, tokens))
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(json.dumps({"run": f"r{i}", "params": n, "tokens": d, "loss": y, "seed": None})
                              for i, (n, d, y) in enumerate(zip(params, tokens, loss, strict=True))))
    assert fit(path, tmp_path / "out", "--holdout", "flops>9e19") == 0
    found, before = (json.loads((f / "fit.json").read_text()) for f in (tmp_path / "out", written))
    assert found["params"] == before["params"] and found["interval"] == before["interval"]


def test_a_ladder_whose_law_breaks_at_the_top_is_called_out(tmp_path, capsys):
    params, tokens = ladder()
    loss = noisy(chinchilla_loss(params, tokens))
    loss[-7:] *= 0.97
    path = write_csv(tmp_path / "runs.csv", params=params.tolist(), tokens=tokens.tolist(), loss=loss.tolist())
    assert fit(path, tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert found["leave_top_budget_out"]["biased"] and found["verdict"].startswith("do not trust")
    assert "verdict: do not trust" in capsys.readouterr().out


def test_the_law_itself_is_not_called_out(written):
    assert json.loads((written / "fit.json").read_text())["verdict"].startswith("no bias seen")


def broken(path, **changes):
    """The simulated file with single cells changed: column=(row, text)."""
    lines = [line.split(",") for line in simulated(path).read_text().splitlines()]
    for name, (row, text) in changes.items():
        lines[row][lines[0].index(name)] = text
    path.write_text("\n".join(",".join(line) for line in lines))
    return path


@pytest.mark.parametrize(("change", "words"), [
    ({"loss": (4, "nan")}, ["line 5", "loss='nan'", "above 0", "--where"]),
    ({"loss": (4, "-2.5")}, ["line 5", "loss='-2.5'"]),
    ({"loss": (4, "inf")}, ["line 5", "loss='inf'"]),
    ({"params": (7, "")}, ["line 8", "params=''"]),
    ({"tokens": (1, "many")}, ["line 2", "tokens='many'"]),
    ({"tokens": (0, "tokns")}, ["no column 'tokens'", "did you mean 'tokns'", "--columns tokens="]),
])
def test_cells_that_are_not_measurements(change, words, tmp_path, capsys):
    refused(capsys, fit(broken(tmp_path / "runs.csv", **change), tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def refused(capsys, code, *words):
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(error) == 1 and error[0].startswith("maxlm: "), error
    for word in words:
        assert word in error[0], error[0]


@pytest.mark.parametrize(("words", "message"), [
    (["--columns", "loss=val"], "no column 'val'"),
    (["--columns", "loss"], "must read OURS=THEIRS"),
    (["--where", "flops>1e30"], "no rows where flops>1e30"),
    (["--where", "size>3"], "no column 'size'"),
    (["--where", "flops"], "must read COLUMN>VALUE"),
    (["--where", "flops<2e18"], "more than one budget"),
    (["--holdout", "flops>1"], "leaves runs on both sides"),
    (["--holdout", "flops>2e18"], "more than one budget"),
    (["--bootstrap", "5"], "at least 100"),
    (["--level", "95"], "--level 95"),
    (["--seed", "-1"], "fit.seed=-1"),
    (["--at-flops", "-1"], "--at-flops"),
])
def test_options_that_cannot_be(words, message, tmp_path, capsys):
    path = simulated(tmp_path / "runs.csv")
    refused(capsys, fit(path, tmp_path / "out", *words), message)
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_there_twice(tmp_path, capsys):
    path = simulated(tmp_path / "runs.csv", run=[f"r{i % 34}" for i in range(35)])
    text = path.read_text().splitlines()
    text[-1] = text[1]
    path.write_text("\n".join(text))
    refused(capsys, fit(path, tmp_path / "out"), "lines 2 and 36 are both run 'r0'", "remove one")


@pytest.mark.parametrize(("text", "message"), [
    ("", "is empty"), ("params,tokens,loss\n", "no rows"), ("params,tokens,loss\n1,2\n", "line 2 has not 3 cells"),
    ('{"params": 1', "line 1 is not JSON"), ("\xff", "not UTF-8"),
])
def test_files_that_are_not_tables(text, message, tmp_path, capsys):
    path = tmp_path / "runs.csv"
    path.write_bytes(text.encode("latin-1"))
    refused(capsys, fit(path, tmp_path / "out"), message)


def test_losses_without_a_law_are_refused(tmp_path, capsys):
    path = noisy_ladder(tmp_path / "runs.csv", lambda size: np.random.default_rng(0).uniform(2, 4, size))
    refused(capsys, fit(path, tmp_path / "out"), "does not fit these runs", "from 0 to 10")
    assert not (tmp_path / "out").exists()


def test_exponents_that_could_be_anything_are_not_extrapolated(tmp_path):
    path = noisy_ladder(tmp_path / "runs.csv", lambda size: noisy(chinchilla_loss(*ladder()), sd=0.06, seed=2))
    assert fit(path, tmp_path / "out") == 0
    verdict = json.loads((tmp_path / "out" / "fit.json").read_text())["verdict"]
    assert verdict.startswith("do not extrapolate: these runs do not determine ")


def noisy_ladder(path, loss):
    params, tokens = ladder()
    return write_csv(path, params=params.tolist(), tokens=tokens.tolist(), loss=loss(params.size).tolist())


@pytest.mark.parametrize("separator", [";", "\t", " , "])
def test_other_separators_and_spaces_in_the_header(separator, tmp_path):
    path = simulated(tmp_path / "runs.csv")
    path.write_text(path.read_text().replace(",", separator))
    assert len(read_runs(path, ("params", "tokens", "loss"))) == 35


def test_a_file_that_is_not_there(tmp_path, capsys):
    refused(capsys, fit(tmp_path / "none.csv", tmp_path / "out"), "No such file")


def test_a_condition_may_name_any_column_of_the_file(tmp_path):
    path = simulated(tmp_path / "runs.csv", family=["c4" if i % 7 else "pile" for i in range(35)], lr=[0.1] * 35)
    assert fit(path, tmp_path / "out", "--where", "family==c4 and lr<1") == 0
    assert json.loads((tmp_path / "out" / "fit.json").read_text())["n"] == 30


@pytest.mark.slow
def test_a_law_of_three_inputs_writes_the_same_files(tmp_path):
    params, tokens = ladder()
    unique = tokens / np.tile([1, 4, 16, 40, 1], 7)
    loss = noisy(chinchilla_loss(params, np.minimum(tokens, 15 * unique)))
    path = write_csv(tmp_path / "runs.csv", params=params.tolist(), tokens=tokens.tolist(), loss=loss.tolist(),
                     unique_tokens=unique.tolist())
    assert fit(path, tmp_path / "out", law="data-constrained") == 0
    found = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert found["frontier_held"] == {"unique_tokens": pytest.approx(unique.max())} and len(found["frontier"]) == 3
    assert found["params"].keys() == {"E", "A", "B", "alpha", "R_D", "R_N"}


def test_the_best_run_of_a_sweep_counts(tmp_path):
    """Three rates for each size and number of tokens; the loss is least at the middle one."""
    params, tokens = (np.repeat(column, 3) for column in ladder())
    best = 1.79 * params**-0.713 * tokens**0.307
    rate = noisy(best * np.tile([0.5, 1, 2], params.size // 3), sd=0.02)
    loss = 2 + np.log(rate / best) ** 2
    path = write_csv(tmp_path / "runs.csv", params=params.tolist(), tokens=tokens.tolist(), loss=loss.tolist(),
                     learning_rate=rate.tolist())
    assert fit(path, tmp_path / "out", law="step-learning-rate") == 0
    found = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert found["n"] == 35 and "of 105 rows the 35 with the lowest loss" in found["notes"][0]
    for name, value in (("alpha", -0.713), ("beta", 0.307)):
        assert found["interval"][name][0] < value < found["interval"][name][1]


def test_a_law_of_one_input_writes_the_same_files(tmp_path):
    flops = np.geomspace(1e18, 1e21, 12)
    path = write_csv(tmp_path / "runs.csv", flops=flops.tolist(), loss=noisy(1.7 + 1600 / flops**0.16).tolist())
    assert fit(path, tmp_path / "out", law="compute") == 0
    found = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert found["frontier"] == [] and found["interval"]["gamma"][0] < 0.16 < found["interval"]["gamma"][1]
