"""Every second of a run has one category, over all its starts."""

import json
import time

import pytest

from maxlm.resilience import Goodput, process_started, read_goodput
from maxlm.resilience import goodput as goodput_module


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(goodput_module.time, "time", lambda: 1.7e9 + self.now)
        monkeypatch.setattr(goodput_module.time, "monotonic", lambda: self.now)

    def __call__(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def start(folder, clock, highest=0, age=0.0):
    goodput = Goodput(folder, started=1.7e9 + clock.now - age)
    goodput.begin(highest)
    return goodput


def steps(goodput, clock, numbers, seconds=1.0):
    with goodput.stepping():
        for number in goodput.waiting(numbers):
            clock(seconds)
            goodput.step_done(number)


def spent(folder):
    return {name: round(value, 6) for name, value in read_goodput(folder)["seconds"].items() if value}


def test_each_phase_gets_its_time_and_they_add_up(tmp_path, clock):
    goodput = start(tmp_path, clock, age=3.0)
    with goodput.phase("restore"):
        clock(2)
        with goodput.phase("compile"):  # inside another: it counts there alone
            clock(5)
    with goodput.stepping():
        clock(10)
        goodput.step_done(1)
        with goodput.phase("evaluation"):
            clock(4)
        with goodput.phase("save"):
            clock(1)
        clock(10)
        goodput.step_done(2)
        clock(0.5)
    clock(6)
    goodput.end()
    assert spent(tmp_path) == {"startup": 3, "restore": 2, "compile": 5, "productive": 20, "evaluation": 4, "save": 1,
                               "other": 6.5}
    found = read_goodput(tmp_path)
    assert found["wall_seconds"] == pytest.approx(41.5) and found["goodput"] == pytest.approx(20 / 41.5)
    assert found["unaccounted_seconds"] == pytest.approx(0)
    assert sum(found["share"].values()) == pytest.approx(1) and found["starts"] == 1


def test_a_restart_adds_idle_and_redone(tmp_path, clock):
    steps(goodput := start(tmp_path, clock), clock, [1, 2, 3, 4])
    goodput.end()
    clock(7)
    steps(goodput := start(tmp_path, clock, highest=4), clock, [3, 4, 5])
    goodput.end()
    assert spent(tmp_path) == {"productive": 5, "redone": 2, "idle": 7}
    assert read_goodput(tmp_path)["starts"] == 2 and read_goodput(tmp_path)["step"] == 5
    assert read_goodput(tmp_path)["unaccounted_seconds"] == pytest.approx(0)


def test_a_rollback_counts_as_redone_without_a_restart(tmp_path, clock):
    steps(goodput := start(tmp_path, clock), clock, [1, 2, 3, 2, 3, 4])
    goodput.end()
    assert spent(tmp_path) == {"productive": 4, "redone": 2}


def test_waiting_for_data_is_not_productive(tmp_path, clock):
    goodput = start(tmp_path, clock)

    def slow():
        for number in (1, 2):
            clock(3)
            yield number

    steps(goodput, clock, slow())
    goodput.end()
    assert spent(tmp_path) == {"productive": 2, "data_wait": 6}


def test_a_step_that_never_ends_is_unfinished(tmp_path, clock):
    goodput = start(tmp_path, clock)
    with pytest.raises(RuntimeError), goodput.stepping():
        clock(1)
        goodput.step_done(1)
        clock(30)
        raise RuntimeError
    goodput.end()
    assert spent(tmp_path) == {"productive": 1, "unfinished": 30}


def test_a_thread_writes_while_the_run_does(tmp_path, monkeypatch):
    monkeypatch.setattr(goodput_module, "SAVE_SECONDS", 0.02)
    goodput = Goodput(tmp_path)
    assert not (tmp_path / "goodput.json").exists()
    goodput.begin(0)
    with goodput.phase("compile"):
        deadline = time.monotonic() + 10
        while read_goodput(tmp_path) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read_goodput(tmp_path)["process"]["ended"] is False
    goodput.end()
    assert read_goodput(tmp_path)["process"]["ended"] is True


@pytest.mark.parametrize("content", ["", "{", '{"format": 1}', "[]"])
def test_a_damaged_file_is_set_aside(tmp_path, clock, capsys, content):
    (tmp_path / "goodput.json").write_text(content)
    steps(goodput := start(tmp_path, clock), clock, [1])
    goodput.end()
    assert "set aside as goodput.damaged.json" in capsys.readouterr().err
    assert spent(tmp_path) == {"productive": 1} and (tmp_path / "goodput.damaged.json").read_text() == content


def test_a_process_that_does_not_write_leaves_no_file(tmp_path, clock):
    goodput = Goodput(tmp_path)
    goodput.begin(0, writes=False)
    goodput.end()
    assert list(tmp_path.iterdir()) == []


def test_the_start_of_the_process_is_known():
    age = time.time() - process_started()
    assert 0.05 < age < 24 * 3600
    assert abs(process_started() - process_started()) < 0.05
    assert json.dumps(process_started())
