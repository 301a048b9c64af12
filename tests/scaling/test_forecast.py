"""`maxlm forecast`: what a seal binds, what a score says, and that a proposed run narrows the interval as foretold."""

import json
import shutil
import time

import numpy as np
import pytest

import maxlm.cli
from maxlm.scaling import forecast
from maxlm.scaling.analysis import analyse
from maxlm.scaling.design import candidates, narrowing
from maxlm.scaling.laws import find_law
from maxlm.scaling.runs import read_runs
from maxlm.schema import to_dict
from tests.scaling.ladders import chinchilla_loss, ladder, noisy, write_csv

TARGET = {"params": 1.5e10, "tokens": 3e11}
AT = "params=1.5e10,tokens=3e11"


@pytest.fixture(autouse=True)
def no_cache_of_its_own(monkeypatch):
    monkeypatch.setattr(maxlm.cli, "_start_jax", lambda: None)


def main(*words):
    return maxlm.cli.main(["forecast", *map(str, words)])


def write_runs(path, seconds=True):
    params, tokens = ladder()
    columns = {"params": params, "tokens": tokens, "loss": noisy(chinchilla_loss(params, tokens)),
               "flops": 6 * params * tokens}
    if seconds:
        columns["seconds"] = columns["flops"] / 4e14
    return write_csv(path, **{name: values.tolist() for name, values in columns.items()})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    patch = pytest.MonkeyPatch()
    patch.setattr(maxlm.cli, "_start_jax", lambda: None)
    path = write_runs(folder / "runs.csv")
    assert main("seal", path, "--law", "chinchilla", "--at", AT, "--out", folder / "sealed", "--bootstrap", 400) == 0
    patch.undo()
    return folder


@pytest.fixture
def sealed(made, tmp_path):
    """A copy to spoil: the data as well, where the forecast says it is."""
    path = tmp_path / "sealed"
    shutil.copytree(made / "sealed", path)
    return path


def rewrite(folder, **changes):
    document = json.loads((folder / "forecast.json").read_text())
    document.update(changes)
    (folder / "forecast.json").write_text(json.dumps(document))
    return document


def test_a_forecast_says_what_it_predicts_and_from_what(made):
    document = json.loads((made / "sealed" / "forecast.json").read_text())
    truth = float(chinchilla_loss(*TARGET.values()))
    low, high = document["interval"]
    assert low < document["prediction"] < high and low < truth < high and high / low < 1.1
    assert document["data"]["sha256"] == read_runs(made / "runs.csv", ("loss",)).sha256
    assert document["seal"] == forecast.digest(document) and document["code"]["sha256"] == forecast.code_digest()
    assert (made / "sealed" / "sealed_runs.csv").read_bytes() == (made / "runs.csv").read_bytes()
    again = main("seal", made / "runs.csv", "--law", "chinchilla", "--at", AT, "--out", made / "sealed")
    assert again == 2  # a sealed forecast is not replaced


def test_a_hit_and_a_miss(sealed, capsys):
    document = json.loads((sealed / "forecast.json").read_text())
    before = (sealed / "forecast.json").read_bytes()
    assert main("score", sealed, "--loss", document["prediction"], "--seal", document["seal"]) == 0
    graded = json.loads(capsys.readouterr().out)
    assert graded["inside"] and graded["verdict"].startswith("hit") and graded["sealed_before_the_run"] is None
    assert main("score", sealed, "--loss", 1.2 * document["prediction"]) == 0
    graded = json.loads(capsys.readouterr().out)
    assert not graded["inside"] and graded["verdict"].startswith("miss: predicted")
    assert graded["relative_error"] == pytest.approx(1 / 1.2 - 1)
    assert (sealed / "forecast.json").read_bytes() == before


def test_a_new_layout_of_the_file_is_no_edit(sealed):
    rewrite(sealed)
    assert main("score", sealed, "--loss", "2") == 0


@pytest.mark.parametrize("changes", [
    {"prediction": 2.0}, {"interval": [0.0, 9.0]}, {"sealed_at": 0.0}, {"level": 0.5}, {"seal": "0" * 64},
    {"target": {"params": 1.0, "tokens": 1.0}}, {"options": {}}, {"verdict": "fine"}, {"note": "added"},
])
def test_any_edit_of_the_forecast_is_caught(sealed, capsys, changes):
    rewrite(sealed, **changes)
    assert main("score", sealed, "--loss", "2") == 3
    error = capsys.readouterr().err
    assert "was edited after it was sealed" in error and len(error.splitlines()) == 1


def test_other_data_other_code_and_another_seal_are_caught(sealed, capsys, tmp_path):
    document = json.loads((sealed / "forecast.json").read_text())
    copy = sealed / "sealed_runs.csv"
    text = copy.read_bytes()
    copy.write_bytes(text.replace(b"2.", b"3.", 1))
    assert main("score", sealed, "--loss", "2") == 3 and "sealed_runs.csv was edited" in capsys.readouterr().err
    copy.unlink()
    assert main("score", sealed, "--loss", "2") == 3 and "is gone" in capsys.readouterr().err
    copy.write_bytes(text)

    original = write_runs(tmp_path / "mine.csv", seconds=False)
    data = {"path": str(original), "copy": "sealed_runs.csv", "sha256": document["data"]["sha256"]}
    rewrite(sealed, data=data, seal=forecast.digest(document | {"data": data}))
    assert main("score", sealed, "--loss", "2") == 3 and "mine.csv was edited" in capsys.readouterr().err
    original.unlink()
    assert main("score", sealed, "--loss", "2", "--seal", document["seal"]) == 3
    assert "was sealed anew" in capsys.readouterr().err

    code = {"version": "0", "sha256": "1" * 64}
    now = json.loads((sealed / "forecast.json").read_text())
    rewrite(sealed, code=code, seal=forecast.digest(now | {"code": code}))
    assert main("score", sealed, "--loss", "2") == 3 and "--other-code" in capsys.readouterr().err
    assert main("score", sealed, "--loss", "2", "--other-code") == 0
    assert json.loads(capsys.readouterr().out)["same_code"] is False


def finished(folder, config, loss, tokens, started):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    rows = [{"step": 1, "tokens": 1, "loss": 9.0, "time": started},
            {"step": 2, "tokens": tokens, "eval_loss": loss, "time": started + 1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "DONE").write_text("2\n")
    return folder


def test_a_run_is_graded_by_its_own_record(made, tmp_path, capsys, request):
    from maxlm.flops import parameter_count
    from maxlm.overrides import load_config
    from maxlm.scaling.cost import tokens_of

    path, recipes = tmp_path / "target.json", request.config.rootpath / "configs"
    base, another = load_config(recipes / "gpt2_124m.py"), load_config(recipes / "quickstart.py")
    path.write_text(json.dumps(to_dict(base)))
    out = tmp_path / "sealed"
    words = ("--law", "chinchilla", "--config", path, "--out", out, "--bootstrap", 400)
    assert main("seal", made / "runs.csv", *words) == 0
    assert json.loads((out / "forecast.json").read_text())["target"]["params"] == parameter_count(base.model).total
    capsys.readouterr()
    later = finished(tmp_path / "later", base, 3.0, tokens_of(base), time.time() + 1)
    assert main("score", out, "--run-dir", later) == 0
    assert json.loads(capsys.readouterr().out)["sealed_before_the_run"] is True
    earlier = finished(tmp_path / "earlier", base, 3.0, tokens_of(base), 1.0)
    assert main("score", out, "--run-dir", earlier) == 0
    assert json.loads(capsys.readouterr().out)["verdict"].startswith("no forecast, the run began before the seal")
    other = finished(tmp_path / "other", another, 3.0, 5, time.time())
    assert main("score", out, "--run-dir", other) == 2 and "is not the run that was forecast" in capsys.readouterr().err
    assert main("score", made / "sealed", "--run-dir", later) == 2 and "the forecast is for" in capsys.readouterr().err


def test_mistakes_are_one_line(made, tmp_path, capsys):
    runs, out = made / "runs.csv", tmp_path / "out"
    for words, message in (
        (("seal", runs, "--law", "chinchilla", "--out", out), "--at or by --config"),
        (("seal", runs, "--law", "chinchilla", "--out", out, "--at", "params=x"), "COLUMN=NUMBER"),
        (("seal", runs, "--law", "chinchilla", "--out", out, "--at", "params=1e9"), "lacks tokens"),
        (("score", out, "--loss", "2"), "no forecast.json"),
        (("score", made / "sealed"), "--run-dir or --loss"),
        (("score", made / "sealed", "--loss", "-1"), "must be a number above 0"),
        (("next", runs, "--law", "chinchilla"), "give the target by --at"),
        (("next", runs, "--law", "compute", "--at", "flops=1e22"), "needs a law of params and tokens alone"),
    ):
        assert main(*words) == 2, words
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
        assert not out.exists()


def test_the_proposed_run_narrows_the_interval_as_foretold(tmp_path, capsys):
    path = write_runs(tmp_path / "runs.csv")
    assert main("next", path, "--law", "chinchilla", "--at", AT, "--bootstrap", 400, "--max-flops", "1e21") == 0
    shown = capsys.readouterr().out
    assert "at 4e+14 FLOP/s" in shown and len(shown.splitlines()) == 2 + 5

    law = find_law("chinchilla")
    analysis = analyse(law, read_runs(path, law.needed), replicates=1000)
    found = candidates(analysis, TARGET, most_flops=1e21, flops_per_second=4e14, startup_seconds=0)
    assert [run.per_hour for run in found] == sorted((run.per_hour for run in found), reverse=True)
    big = max(found, key=lambda run: run.narrower)
    small = {"params": np.array([1e7]), "tokens": np.array([1e18 / 6e7])}
    assert big.narrower > 0.1 > narrowing(analysis, TARGET, small)[0] >= 0

    def width(*more):
        params, tokens = ladder()
        loss = noisy(chinchilla_loss(params, tokens))
        for n, d in more:
            params, tokens = np.append(params, n), np.append(tokens, d)
            loss = np.append(loss, np.exp(analysis.fitted.log_loss({"params": np.array([n]), "tokens": np.array([d])})))
        write_csv(tmp_path / "more.csv", params=params.tolist(), tokens=tokens.tolist(), loss=loss.tolist())
        with_more = analyse(law, read_runs(tmp_path / "more.csv", law.needed), replicates=1000)
        return np.subtract(*np.percentile(with_more.fitted.log_loss(
            {name: np.array([value]) for name, value in TARGET.items()}, with_more.found.stated), [97.5, 2.5]))

    assert 1 - width((big.params, big.tokens)) / width() == pytest.approx(big.narrower, abs=0.15)
