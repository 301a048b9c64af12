"""The watchdog ends what hangs, within its bound and naming the place, and lets live what is slow."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from watchdog_worker import BOUND

import maxlm
from maxlm.config.resilience import WatchdogConfig
from maxlm.resilience import Goodput, HostTimes, Watchdog
from maxlm.resilience.stragglers import read_host_times, slowest

WORKER = pathlib.Path(__file__).with_name("watchdog_worker.py")


def run(folder, what):
    """(exit code, stdout, stderr, seconds) of the worker."""
    begun = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(maxlm.__file__).parents[1])}
    child = subprocess.run([sys.executable, WORKER, folder, what], capture_output=True, text=True, env=environment,
                           timeout=50)
    return child.returncode, child.stdout, child.stderr, time.monotonic() - begun


def test_a_hang_ends_with_75_and_names_the_function(tmp_path):
    code, out, error, seconds = run(tmp_path, "sleep")
    assert (code, out) == (75, "") and seconds < 30
    assert "gave no sign of life" in error and "in hang_here" in error and "last step finished 4" in error
    mark, = (tmp_path / "watchdog").glob("*.json")
    facts = json.loads(mark.read_text())
    assert (facts["exit_code"], facts["phase"], facts["last_step_finished"]) == (75, "unfinished", 4)
    assert BOUND < facts["silent_seconds"] < 5 * BOUND
    assert facts["collectives"] == "no step was compiled yet"
    assert "in hang_here" in (tmp_path / "watchdog" / facts["stacks"]).read_text()


def test_a_hang_in_c_that_holds_the_lock_ends_too(tmp_path):
    code, out, error, seconds = run(tmp_path, "locked")
    assert (code, out) == (1, "") and seconds < 30
    assert "Timeout (" in error and "watchdog_worker.py" in error and "in main" in error


@pytest.mark.parametrize("what", ["slow", "compile"])
def test_slow_steps_and_a_long_compilation_are_no_hang(tmp_path, what):
    code, out, error, _ = run(tmp_path, what)
    assert (code, out, error) == (0, "ended\n", "")
    assert not (tmp_path / "watchdog").exists()


def test_the_bound_follows_the_median_step(tmp_path, monkeypatch):
    clock = iter(float(second) for second in range(0, 1000, 10))
    watchdog = Watchdog(WatchdogConfig(step_seconds=30.0, step_factor=5.0, phase_seconds=90.0), tmp_path,
                        Goodput(tmp_path), process=0)
    assert watchdog.bound("unfinished") == watchdog.bound("data_wait") == 30.0
    assert watchdog.bound("compile") == watchdog.bound("save") == watchdog.bound("evaluation") == 90.0
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    for step in range(10):
        watchdog.finished(step)
    monkeypatch.undo()
    assert watchdog.bound("unfinished") == 50.0


def row(process, own, step=1.0):
    return {"process": process, "host": f"host{process}", "own_seconds": own, "step_seconds": step}


def test_the_slowest_host_is_named_where_it_holds_the_others_up():
    fine = [row(n, 0.1) for n in range(4)]
    assert slowest(fine, 2.0) is None and slowest([row(0, 0.9)], 2.0) is None
    assert slowest([*fine, row(4, 0.9)], 2.0)["process"] == 4
    assert slowest([*fine, row(4, 0.3)], 2.0) is None, "hidden behind its device"
    assert slowest([row(0, 0.6), row(1, 0.9)], 2.0) is None, "all of them are slow"


def test_hosts_write_their_times_and_the_first_names_the_slowest(tmp_path):
    config, said = WatchdogConfig(host_report_steps=4), []
    for process, own in ((1, 0.05), (0, 0.0)):
        times = HostTimes(config, tmp_path, process=process, processes=2, say=said.append)
        for step in range(1, 10):
            time.sleep(own)
            with times.device_wait():
                time.sleep(0.05 - own)
            times.finished(step)
        times.close()
    written = read_host_times(tmp_path)
    assert [row["step"] for row in written] == [8, 8]
    assert written[0]["own_seconds"] < 0.02 < 0.04 < written[1]["own_seconds"] <= written[1]["step_seconds"]
    line, = said
    assert "process 1" in line and line.startswith("straggler: host ")
