"""`maxlm status` and goodput.json of real processes: running, killed, preempted, done; wall time reconciles."""

import json
import signal
import time

import pytest

from maxlm.cli import main
from maxlm.resilience import Ledger, read_goodput
from tests.training.runs import ONE_DEVICE, arguments, command, prepared, rows_of, start, write_config

SETTINGS = ("train.num_steps=3000", "checkpoint.every_steps=40", "eval.every_steps=0", "eval.num_batches=1",
            "logging.every_steps=5", "logging.sample_prompt=")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder / "tiny.py", prepared(folder / "data"))


def wait_until(process, condition):
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def status(run, capsys):
    capsys.readouterr()
    assert main(["status", "--run-dir", str(run), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_run_killed_and_stopped(config, tmp_path, capsys):
    """Two lives with a pause between them: each state is told, and every second has its place."""
    run, began = tmp_path / "run", time.time()
    checkpoints = lambda: {int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdecimal()}  # noqa: E731
    process = start(arguments(config, run, *SETTINGS), ONE_DEVICE)
    wait_until(process, lambda: checkpoints() and read_goodput(run))
    found = status(run, capsys)
    assert found["state"] == "running" and found["starts"] == 1 and found["num_steps"] == 3000
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = time.time()
    found = status(run, capsys)
    assert found["state"] == "stopped" and found["checkpoint"] == max(checkpoints()) <= found["step"]
    time.sleep(1.5)

    process = start(arguments(config, run, *SETTINGS), ONE_DEVICE)
    restarted, reached = time.time(), found["step"]
    wait_until(process, lambda: status(run, capsys)["step"] > reached + 5)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    ended = (run / "goodput.json").stat().st_mtime  # leaving Python afterwards is not counted
    assert process.returncode == 0, error
    found = status(run, capsys)
    assert found["state"] == "preempted" and found["starts"] == 2 and found["ledger_lines_altered"] == []
    assert found["step"] == found["checkpoint"] == rows_of(run)[-1]["step"] and found["nondeterminism"] == []

    goodput = found["goodput"]
    assert abs(goodput["unaccounted_seconds"]) < 0.01 * goodput["wall_seconds"]
    assert goodput["wall_seconds"] == pytest.approx(ended - began, rel=0.01)
    seconds = goodput["seconds"]
    # Up to 2 s of the killed process were not written down; they are idle.
    assert restarted - killed - 0.1 <= seconds["idle"] <= restarted - killed + 2.5
    assert all(seconds[name] > 0 for name in ("productive", "redone", "startup", "compile", "save", "restore"))
    assert main(["status", "--run-dir", str(run)]) == 0
    out = capsys.readouterr().out
    assert "preempted" in out and "redone" in out and "100.00%" not in out


def test_a_finished_run_is_done(config, tmp_path, capsys):
    code, _, error = command(arguments(config, tmp_path, "eval.num_batches=1"), ONE_DEVICE)
    assert code == 0, error
    found = status(tmp_path, capsys)
    assert found["state"] == "done" and found["step"] == found["checkpoint"] == found["num_steps"] == 6
    assert found["loss"] == [row for row in rows_of(tmp_path) if "loss" in row][-1]["loss"]
    assert found["goodput"]["seconds"]["evaluation"] > 0


def test_anomalies_are_counted(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"train": {"num_steps": 9}}))
    row = {"step": 7, "tokens": 70, "loss": 2.5, "skipped_updates": 3, "spikes": 2}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n" + '{"step": 8, "tok')  # cut short by a kill
    ledger = Ledger(tmp_path)
    ledger.start(0, "a", {})
    for _ in range(2):  # made again after a restart, it is still one
        ledger.rollback(4, [5, 6])
    ledger.close()
    found = status(tmp_path, capsys)
    assert (found["skipped_updates"], found["spikes"], found["rollbacks"], found["loss"]) == (3, 2, 1, 2.5)
    assert main(["status", "--run-dir", str(tmp_path)]) == 0
    assert "3 updates skipped, 2 spikes of the loss, 1 rollbacks" in capsys.readouterr().out


def test_a_watchdog_s_mark_says_hung(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"train": {"num_steps": 9}}))
    assert status(tmp_path, capsys)["state"] == "stopped"
    (tmp_path / "watchdog").mkdir()
    (tmp_path / "watchdog" / "7.json").write_text("{}")
    found = status(tmp_path, capsys)
    assert (found["state"], found["watchdog"]) == ("hung", ["7.json"])


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["status", "--run-dir", str(tmp_path / "none")]) == 2
    assert "no run has started there" in capsys.readouterr().err
