"""SIGTERM to processes of a run: all save at one step, exit 0, and the run goes on as if nothing had been."""

import json
import signal
import time

import pytest

from maxlm.checkpoint import latest_step, tree_digest
from tests.multiprocess.launch import finish, start, train
from tests.training.runs import prepared, rows_of, write_config

pytestmark = pytest.mark.slow
STEPS = 4000  # never reached: JAX looks for a signal once a second
SETTINGS = ("schedule.name=constant", "logging.sample_prompt=", "eval.every_steps=1", "eval.num_batches=4",
            "checkpoint.every_steps=20")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preempted")
    return write_config(folder / "tiny.py", prepared(folder / "data"))


def steps_logged(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def life(config, run, processes, told, signals, after_step):
    """Starts all, sends those in `told` each of `signals` once `after_step` is logged, 0.05 s apart, until they have
    ended; how each ended."""
    started = start(config, run, *SETTINGS, f"train.num_steps={STEPS}", processes=processes, devices=4 // processes)
    deadline = time.monotonic() + 300
    while steps_logged(run) < after_step and time.monotonic() < deadline and all(p.poll() is None for p in started):
        time.sleep(0.01)
    for number in signals:
        for index in told:  # nothing is sent to one that has ended
            started[index].send_signal(number)
        time.sleep(0.05)
    return finish(started)


@pytest.mark.parametrize("processes, told", [(2, (1,)), (4, (0, 1, 2, 3))])
def test_all_save_one_step_and_the_run_goes_on(config, tmp_path, processes, told):
    run = tmp_path / "run"
    ends = life(config, run, processes, told, [signal.SIGTERM], after_step=21)
    assert [end.code for end in ends] == [0] * processes, [end.error for end in ends]
    last = rows_of(run)[-1]
    assert last["preempted"] is True and 21 <= last["step"] < STEPS
    assert latest_step(run / "checkpoints") == last["step"]
    assert f"stopped at step {last['step']} as asked" in ends[0].error
    end = f"train.num_steps={last['step'] + 5}"
    train(config, run, *SETTINGS, end, processes=processes, devices=4 // processes)
    whole = tmp_path / "whole"
    train(config, whole, *SETTINGS, end, processes=2, devices=2)  # as many devices: gloo sums in the same order
    assert tree_digest(run / "checkpoints") == tree_digest(whole / "checkpoints")


def test_a_second_signal_ends_at_once_and_harms_nothing(config, tmp_path):
    run = tmp_path / "run"
    # Two at once may arrive as one, and a busy machine looks late: sent until it has ended.
    ends = life(config, run, 2, (1,), [signal.SIGTERM] * 100, after_step=41)  # so that 20 is complete
    assert ends[1].code == 128 + signal.SIGTERM, ends[1].error
    assert ends[0].code in (75, -signal.SIGABRT), ends[0].error  # noticed by gloo, or by JAX's service
    saved = latest_step(run / "checkpoints")
    assert saved >= 20
    train(config, run, *SETTINGS, f"train.num_steps={saved + 2}", processes=2, devices=2)
    assert (run / "DONE").exists()
