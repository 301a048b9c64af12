"""A run on poisoned data: updates skipped, spikes rolled back, both the same whatever happens to the run meanwhile."""

import json
import random
import signal
import time

import jax.numpy as jnp
import pytest

from maxlm.checkpoint import Checkpointer, latest_step, list_checkpoints, read_meta, tree_digest
from maxlm.config import RunConfig
from maxlm.resilience import RunStopped
from maxlm.training.anomalies import StepAnomalies
from tests.multiprocess import launch
from tests.training.poisoned import poison
from tests.training.runs import ONE_DEVICE, arguments, prepared, rows_of, start, timeless, train, write_config

STEPS = 20
COMMON = (f"train.num_steps={STEPS}", "eval.every_steps=0", "logging.sample_prompt=")
NAN = ("model.tie_embeddings=false", "optimizer.weight_decay=0.0")
ROLLBACK = ("resilience.spike.action=rollback", "resilience.spike.window=6", "resilience.spike.threshold=2.0",
            "resilience.spike.skip_batches=3")
POISONED = ("tests.training.poisoned", '{"spike": [11, 20]}')


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("poisoned")
    return write_config(folder / "tiny.py", prepared(folder / "data"))


def events_of(run):
    path = run / "anomalies.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def digest(run, step=None):
    return tree_digest(run / "checkpoints", step)


def test_a_bad_batch_costs_its_update_alone(config, tmp_path, monkeypatch, capsys):
    poison({"nan": [5]}, monkeypatch.setattr)
    assert train(config, tmp_path, *COMMON, *NAN, "checkpoint.every_steps=5", "checkpoint.keep_last=4") == 0
    rows = {row["step"]: row for row in rows_of(tmp_path) if "loss" in row}
    assert [rows[step]["skipped_updates"] for step in (5, 6, 7, STEPS)] == [0, 1, 1, 1]
    assert rows[6]["loss"] is None and rows[7]["loss"] < rows[1]["loss"]
    assert rows[6]["tokens"] == rows[5]["tokens"] < rows[7]["tokens"]
    event, = events_of(tmp_path)
    assert (event["event"], event["step"], event["data_index"]) == ("skipped_update", 6, 5)
    assert "step 6  update skipped: loss nan" in capsys.readouterr().err


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    anomalies = StepAnomalies(RunConfig(), tmp_path, lambda: 4, print)
    anomalies.check_state(5, {"a": jnp.ones(3), "b": jnp.zeros(())})
    with pytest.raises(RunStopped, match="after step 5 that are not finite.* saved as step 4"):
        anomalies.check_state(5, {"a": jnp.ones(3), "b": jnp.asarray(jnp.inf)})


def test_bad_batches_without_end_stop_the_run_with_the_last_good_state_saved(config, tmp_path, monkeypatch, capsys):
    poison({"nan": list(range(8, 100))}, monkeypatch.setattr)
    limit = "resilience.nonfinite.max_consecutive=3"
    assert train(config, tmp_path, *COMMON, *NAN, limit, "checkpoint.every_steps=8") == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "4 updates in a row were skipped" in error and "saved as step 13" in error and "anomalies.jsonl" in error
    assert digest(tmp_path, 13) == digest(tmp_path, 8), "nothing was learnt from the bad batches, and nothing lost"
    assert latest_step(tmp_path / "checkpoints") == 13 and not (tmp_path / "DONE").exists()
    monkeypatch.undo()  # the data, or the machine, is well again: the run goes on from there, poison in its table
    monkeypatch.setattr("maxlm.training.anomalies._finite", lambda params: True)
    assert train(config, tmp_path, *COMMON, *NAN, limit, "checkpoint.every_steps=8") == 0


@pytest.fixture(scope="module")
def rolled_back(config, tmp_path_factory):
    """(run, steps saved, in order) of a run with a spike at a step that is saved, and another one."""
    run, saved = tmp_path_factory.mktemp("rolled") / "run", []
    save = Checkpointer.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "save", lambda self, step, *rest: saved.append(step) or save(self, step, *rest))
        poison({"spike": [11, 20]}, patch.setattr)
        assert train(config, run, *COMMON, *ROLLBACK, "checkpoint.every_steps=4") == 0
    return run, saved


def test_a_spike_is_rolled_back_and_its_batches_left_out(rolled_back):
    run, saved = rolled_back
    # 12 only once: not before its own spike was seen. 16 twice: it had seen batches that the second spike left out.
    assert saved == [4, 8, 12, 16, 16, 20]
    first, second = events_of(run)
    assert (first["event"], first["step"], first["data_index"], first["back_at"]) == ("rollback", 12, 11, 8)
    assert first["skipped_data"] == [9, 10, 11] and first["loss"] > first["limit"] > first["median"]
    assert (second["step"], second["data_index"], second["back_at"]) == (18, 20, 12)
    assert second["skipped_data"] == [18, 19, 20]
    meta = read_meta(run / "checkpoints")
    assert meta["data"]["skipped"] == [[9, 12], [18, 21]] and meta["anomalies"]["rollbacks"] == [12, 18]
    rows = [row for row in rows_of(run) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "rows of what was undone are gone"
    assert max(row["loss"] for row in rows[8:]) < first["limit"]
    assert [row.step for row in list_checkpoints(run / "checkpoints")] == [16, 20]


def test_it_ends_alike_whichever_checkpoint_it_goes_back_to(rolled_back, config, tmp_path, monkeypatch):
    poison({"spike": [11, 20]}, monkeypatch.setattr)
    assert train(config, tmp_path, *COMMON, *ROLLBACK, "checkpoint.every_steps=15") == 0
    assert [event["back_at"] for event in events_of(tmp_path)] == [0, 15]
    assert digest(tmp_path) == digest(rolled_back[0])
    assert timeless(tmp_path) == timeless(rolled_back[0])


def test_the_reported_spike_is_trained_on(rolled_back, config, tmp_path, monkeypatch, capsys):
    poison({"spike": [11]}, monkeypatch.setattr)
    report = "resilience.spike.action=report"
    assert train(config, tmp_path, *COMMON, *ROLLBACK, report, "checkpoint.every_steps=10") == 0
    event, = events_of(tmp_path)
    assert (event["event"], event["data_index"]) == ("spike", 11)
    assert digest(tmp_path) != digest(rolled_back[0]), "the comparison of digests can fail"
    assert "step 12  loss" in capsys.readouterr().err


@pytest.mark.slow
def test_spike_after_spike_stops_the_run(config, tmp_path, monkeypatch, capsys):
    poison({"spike": list(range(11, 40))}, monkeypatch.setattr)
    limit = "resilience.spike.max_rollbacks=2"
    assert train(config, tmp_path, *COMMON, *ROLLBACK, limit, "checkpoint.every_steps=4") == 3
    assert "after 2 rollbacks within 1000 steps" in capsys.readouterr().err
    assert latest_step(tmp_path / "checkpoints") == 4, "what came before the first bad batches"


def life(config, run, killed_after=None, delay=0.0):
    """One life of the poisoned run: to its end, or killed `delay` seconds after it had so many rows."""
    settings = arguments(config, run, *COMMON, *ROLLBACK, "checkpoint.every_steps=4")
    process = start(settings, ONE_DEVICE, program=POISONED)
    rows, deadline = run / "metrics.jsonl", time.monotonic() + 100
    while killed_after and process.poll() is None and time.monotonic() < deadline:
        if rows.exists() and rows.read_text().count("\n") >= killed_after:
            time.sleep(delay)
            process.kill()
            break
        time.sleep(0.01)
    _, error = process.communicate(timeout=100)
    assert process.returncode in ((0, -signal.SIGKILL) if killed_after else (0,)), error


@pytest.mark.slow
def test_killed_around_spikes_and_rollbacks_it_ends_with_the_same_bits(config, tmp_path):
    draw = random.Random(0)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    life(config, whole)
    for row in (11, 9, 17, 19):  # before a spike is seen, after going back from it, and the same for the second
        life(config, broken, row, draw.uniform(0, 0.05))
    assert not (broken / "DONE").exists() or len(events_of(broken)) > 2
    life(config, broken)
    assert digest(broken) == digest(whole)
    assert timeless(broken) == timeless(whole)


@pytest.mark.slow
def test_two_processes_roll_back_together_and_end_like_one(config, tmp_path):
    ends = {}
    for processes in (1, 2):
        run = tmp_path / str(processes)
        started = launch.start(config, run, *COMMON, *ROLLBACK, "checkpoint.every_steps=4", "mesh.data=2",
                               processes=processes, devices=2 // processes, program=("-m", *POISONED))
        assert [end.code for end in launch.finish(started)] == [0] * processes
        assert [event["back_at"] for event in events_of(run)] == [8, 12]
        ends[processes] = digest(run)
    assert ends[1] == ends[2]
