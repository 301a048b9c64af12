"""`maxlm train` end to end on a tiny corpus: what it writes, continues, refuses; `eval` and `generate` from it."""

import json
import shutil

import pytest

from maxlm.cli import main
from maxlm.training.report import finish
from tests.training.runs import SEQ_LEN, STEPS, prepared, rows_of, timeless, train, write_config, write_texts

CONTRACT = {"step", "tokens", "loss", "learning_rate", "grad_norm", "step_seconds", "tokens_per_second_per_chip", "mfu",
            "time"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(config file, finished run): trained once for all tests, which copy it."""
    folder = tmp_path_factory.mktemp("made")
    config = write_config(folder / "tiny.py", prepared(folder / "data"))
    assert train(config, folder / "run", "logging.tensorboard=true") == 0
    return config, folder / "run"


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "run")
    return tmp_path / "run"


def refused(code, capsys, *words):
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and error[-1].startswith("maxlm: "), error
    for word in words:
        assert word in error[-1], error[-1]


def test_what_a_run_writes(made):
    run = made[1]
    assert {p.name for p in run.iterdir()} == {
        ".lock", "DONE", "checkpoints", "config.json", "goodput.json", "ledger.jsonl", "loss.png", "metrics.jsonl",
        "sample.txt", "tensorboard"}
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir()) == [4, 6]
    assert (run / "DONE").read_text() == f"{STEPS}\n"
    assert json.loads((run / "config.json").read_text())["train"]["num_steps"] == STEPS
    assert (run / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list((run / "tensorboard").iterdir())
    assert (run / "sample.txt").read_text().startswith("the ")


def test_the_rows_of_metrics(made):
    trained = [row for row in rows_of(made[1]) if "loss" in row]
    held_out = [row for row in rows_of(made[1]) if "eval_loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert all(row.keys() >= CONTRACT for row in trained)
    assert all(row["mfu"] is None for row in trained), "a CPU has no known peak"
    assert trained[0]["learning_rate"] == pytest.approx(5e-3) and trained[2]["learning_rate"] == pytest.approx(1e-2)
    tokens = [row["tokens"] for row in trained]
    assert all(0 < b - a <= 8 * SEQ_LEN for a, b in zip(tokens, tokens[1:], strict=False))
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert [row["step"] for row in held_out] == [3, 6]
    assert all(row.keys() >= {"eval_loss", "eval_bits_per_byte", "tokens", "time"} for row in held_out)


def test_the_same_command_again_has_nothing_to_do(made, run, capsys):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}
    assert train(made[0], run) == 0
    assert "already trained to step 6; raise train.num_steps" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"} == before


def test_more_steps_go_on_from_the_last(made, run, capsys):
    rows = rows_of(run)
    assert train(made[0], run, "train.num_steps=8", "checkpoint.every_steps=5", "logging.every_steps=2") == 0
    assert "resumed from step 6" in capsys.readouterr().err
    assert rows_of(run)[: len(rows)] == rows
    assert [row["step"] for row in rows_of(run)[len(rows) :]] == [8, 8]
    assert (run / "DONE").read_text() == "8\n"


def test_a_run_killed_before_it_was_done_is_finished(made, run, capsys):
    (run / "DONE").unlink()
    (run / "sample.txt").unlink()
    expected = rows_of(run)
    assert train(made[0], run) == 0
    assert "held-out text after 6 steps" in capsys.readouterr().out
    assert (run / "DONE").exists() and (run / "sample.txt").exists()
    assert rows_of(run) == expected, "its evaluation is not written twice"


def test_another_mesh_and_logging_are_accepted(made, run):
    shutil.rmtree(run / "checkpoints" / "6")
    assert train(made[0], run, "mesh.data=4", "mesh.fsdp=2", "logging.every_steps=3") == 0
    assert [row["step"] for row in rows_of(run) if "loss" in row] == [1, 2, 3, 4, 6]


@pytest.mark.parametrize(("change", "words"), [
    ("optimizer.learning_rate=0.5", ["optimizer.learning_rate: 0.01 -> 0.5", "another --run-dir"]),
    ("train.num_steps=4", ["train.num_steps=4 is below step 6", "set it to 6 or more"]),
])
def test_another_training_is_refused(made, run, capsys, change, words):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}
    refused(train(made[0], run, change, "train.num_steps=7" if "rate" in change else change), capsys, *words)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"} == before


def test_data_changed_under_the_run_is_refused(made, run, tmp_path, capsys):
    other = prepared(tmp_path / "other", seed=1)
    refused(train(made[0], run, f"data.path={other}", "train.num_steps=8"), capsys,
            "not what this run was trained on", "another --run-dir")


def test_eval_from_the_run_directory(made, run, capsys):
    assert main(["eval", "--run-dir", str(run)]) == 0
    result = json.loads(capsys.readouterr().out)
    last = rows_of(run)[-1]
    assert result["step"] == STEPS
    assert result["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(last["eval_bits_per_byte"], rel=1e-5)
    assert main(["eval", "--run-dir", str(run), "--step", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > result["loss"]


def test_generate_from_the_run_directory(run, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", "--run-dir", str(run), "--prompt", "the q", "--tokens", "12", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("the q")


def test_a_mixture_with_a_trained_tokenizer(made, tmp_path, capsys):
    """Two folders by weight; the run directory keeps the tokenizer and what names its end token."""
    first = prepared(tmp_path / "first", tokenizer="bpe:260")
    second = prepared(tmp_path / "second", seed=1, tokenizer=str(first / "tokenizer.json"))
    mixture = json.dumps([{"path": str(first), "weight": 3.0}, {"path": str(second)}])
    run = tmp_path / "run"
    assert train(made[0], run, "data.path=none", f"data.mixture={mixture}") == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (run / name).read_bytes() == (first / name).read_bytes()
    out = capsys.readouterr().out
    assert "this model" in out and "gzip" not in out, "two folders are not the text gzip was measured on"
    assert main(["generate", "--run-dir", str(run), "--prompt", "the", "--tokens", "3"]) == 0
    assert main(["eval", "--run-dir", str(run), "--data", str(made[0].parent / "data")]) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_a_source_is_prepared_once_into_the_run(made, tmp_path):
    texts = write_texts(tmp_path / "texts")
    sets = ("data.path=none", f"data.source={texts}", "data.heldout_fraction=0.2")
    assert train(made[0], tmp_path / "run", *sets) == 0
    manifest = (tmp_path / "run" / "data" / "manifest.json").read_text()
    assert train(made[0], tmp_path / "run", *sets) == 0
    assert (tmp_path / "run" / "data" / "manifest.json").read_text() == manifest
    same = [row for row in timeless(tmp_path / "run") if "loss" in row]
    assert same == [row for row in timeless(made[1]) if "loss" in row], "the same text is the same training"


def test_without_held_out_text_the_report_says_so(made, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(made[0].parent / "data", data)
    _hold_nothing_out(data)
    run = tmp_path / "run"
    assert train(made[0], run, f"data.path={data}", "eval.every_steps=0") == 0
    captured = capsys.readouterr()
    assert "no held-out text to evaluate on" in captured.err
    assert "no held-out result" in captured.out
    assert not [row for row in rows_of(run) if "eval_loss" in row] and (run / "DONE").exists()
    refused(main(["eval", "--run-dir", str(run)]), capsys, "no held-out text", "--heldout-fraction")


def _hold_nothing_out(data):
    from maxlm.data.manifest import content_digest, load_manifest

    manifest = load_manifest(str(data))
    values = json.loads((data / "manifest.json").read_text())
    values["heldout"] |= dict(documents=0, tokens=0, bytes=0, rows=0, shards=[], compressed_bytes=0,
                              gzip9_bits_per_byte=None, xz9_bits_per_byte=None)
    nothing = type(manifest.heldout)(**values["heldout"] | {"shards": ()})
    values["digest"] = content_digest(
        manifest.seq_len, manifest.eot_id, manifest.tokenizer, manifest.train, nothing)
    (data / "manifest.json").write_text(json.dumps(values))


def test_compressors_that_were_not_measured_are_said_to_be_missing(made, capsys, monkeypatch):
    import dataclasses

    from maxlm.overrides import load_config
    from maxlm.training import report
    from maxlm.training.evaluate import Evaluation
    from maxlm.training.loop import Outcome

    config = load_config(made[0])
    config = dataclasses.replace(config, logging=dataclasses.replace(config.logging, sample_prompt=""))
    monkeypatch.setattr(report, "load_manifest", lambda path: _Unmeasured)
    finish(config, made[1], Outcome(6, 100, False, Evaluation(10.0, 5, 5)))
    out = capsys.readouterr().out
    assert "gzip -9      not available" in out and "xz -9        not available" in out


class _Unmeasured:
    class heldout:
        gzip9_bits_per_byte = xz9_bits_per_byte = None
