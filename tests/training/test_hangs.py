"""The real command hangs and ends with exit code 75; what was saved goes on."""

import json
import signal
import time

import pytest

from tests.multiprocess import launch
from tests.training.runs import ONE_DEVICE, arguments, prepared, rows_of, start, write_config

STEPS, BOUND = 12, 8.0
SETTINGS = (f"train.num_steps={STEPS}", "eval.every_steps=0", "logging.sample_prompt=", "checkpoint.every_steps=2",
            f"resilience.watchdog.step_seconds={BOUND}")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hanging")
    return write_config(folder / "tiny.py", prepared(folder / "data"))


def mark_of(run):
    mark, = (run / "watchdog").glob("*.json")
    return json.loads(mark.read_text())


@pytest.mark.slow
def test_data_that_never_comes(config, tmp_path):
    words = arguments(config, tmp_path, *SETTINGS)
    process = start(words, ONE_DEVICE, program=("tests.training.blocked", "7"))
    _, error = process.communicate(timeout=240)
    assert process.returncode == 75, error
    assert "wait_for_a_disk_that_never_answers" in error and "__next__" in error
    mark = mark_of(tmp_path)
    assert (mark["phase"], mark["last_step_dispatched"], mark["last_step_finished"]) == ("data_wait", 7, 6)
    assert BOUND < mark["silent_seconds"] < 3 * BOUND
    again = start(words, ONE_DEVICE)
    _, error = again.communicate(timeout=240)
    assert again.returncode == 0 and "resumed from step 6" in error, error


@pytest.mark.slow
def test_a_process_that_stands_still_ends_the_other(config, tmp_path):
    """One of two is stopped: the other hangs in a collective, and says which ones there are."""
    more = ("train.num_steps=2000", "checkpoint.every_steps=1000", "mesh.data=2")
    pair = launch.start(config, tmp_path, *SETTINGS, *more, processes=2, devices=1)
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "metrics.jsonl").exists() or len(rows_of(tmp_path)) < 5:
            assert time.monotonic() < deadline and pair[0].poll() is None, pair[0].communicate()
            time.sleep(0.05)
        pair[1].send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        _, error = pair[0].communicate(timeout=120)
        assert pair[0].returncode == 75, error
        assert time.monotonic() - begun < 6 * BOUND
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert "gave no sign of life" in error and "in _finished" in error
    mark = mark_of(tmp_path)
    assert mark["process"] == 0 and mark["phase"] == "unfinished"
    assert ["data"] in [row["over"] for row in mark["collectives"]]
