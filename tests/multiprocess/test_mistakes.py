"""A mistake that one process makes, or sees, ends all of them: soon, with one line and one exit code."""

import socket
import subprocess
import sys

import pytest

from maxlm.cli import main
from maxlm.parallel import distributed
from tests.multiprocess.launch import finish, free_port, start, with_devices
from tests.training.runs import arguments, prepared, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    return write_config(folder / "tiny.py", prepared(folder / "data"))


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("--coordinator localhost:1", "--num-processes and --process-id must be given too"),
        ("--num-processes 2 --process-id 0", "--coordinator must be given too"),
        ("--coordinator localhost --num-processes 2 --process-id 0", "must be HOST:PORT"),
        ("--coordinator localhost:99999 --num-processes 2 --process-id 0", "must be HOST:PORT"),
        ("--coordinator localhost:1 --num-processes 0 --process-id 0", "--num-processes 0 must be 1 or more"),
        ("--coordinator localhost:1 --num-processes 2 --process-id 2", "--process-id 2 must be from 0 to 1"),
        ("--coordinator localhost:1 --num-processes 2 --process-id -1", "--process-id -1 must be from 0 to 1"),
    ],
)
def test_flags_that_do_not_fit(config, tmp_path, capsys, words, complaint):
    assert main([*arguments(config, tmp_path / "run"), *words.split()]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_one_process_of_one_needs_no_coordinator(config, tmp_path):
    with distributed.processes("localhost:1", 1, 0) as several:
        assert not several


def test_a_coordinator_that_nobody_runs(monkeypatch):
    monkeypatch.setattr(distributed, "INITIALIZE_SECONDS", 0.5)
    with pytest.raises(ValueError, match="could not be reached for 0.5 s"), \
            distributed.processes(f"localhost:{free_port()}", 2, 1):
        pass


def test_a_port_in_use(config, tmp_path):
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", 0))
        other.listen()
        words = arguments(config, tmp_path / "run")
        words += ["--coordinator", f"localhost:{other.getsockname()[1]}", "--num-processes", "2", "--process-id", "0"]
        ended = subprocess.run([sys.executable, "-m", "maxlm", *words], capture_output=True, text=True, timeout=60,
                               env=with_devices(1))
    assert ended.returncode == 2
    assert "cannot be used on this host (Address already in use): choose another for all" in ended.stderr


def test_others_that_never_come_to_a_launched_process(monkeypatch):
    """Not a mistake of the user's: the scheduler is to start it again."""
    monkeypatch.setattr(distributed, "LAUNCHED_SECONDS", 0.5)
    for name, value in (("JAX_COORDINATOR_ADDRESS", f"localhost:{free_port()}"), ("JAX_NUM_PROCESSES", "2"),
                        ("JOB_COMPLETION_INDEX", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(distributed.PeerError, match="could not be reached for 0.5 s") as raised, \
            distributed.processes(None, None, None):
        pass
    assert raised.value.exit_code == 75


def test_others_that_never_come(tmp_path):
    """Process 0 waits no longer than it says, and does not abort with a stack trace."""
    code = ("from maxlm.parallel import distributed as d\nd.INITIALIZE_SECONDS = 1\n"
            f"with d.processes('localhost:{free_port()}', 2, 0): pass")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                           env=with_devices(1))
    assert ended.returncode == 2
    assert ended.stderr == ("maxlm: waited 1 s for all 2 processes of this run: start each with its own --process-id\n")


@pytest.mark.parametrize(
    "words, line",
    [
        (["--set", "data.path=nowhere"], "process 1 failed opening the data: data.path='nowhere' does not exist"),
        pytest.param(["--set", "train.seed=3"], "the config is not the same on process 1 as on process 0",
                     marks=pytest.mark.slow),
        pytest.param(["--set", "train.sed=3"], "process 1 failed reading the config: unknown config key 'train.sed'",
                     marks=pytest.mark.slow),
    ],
)
def test_a_mistake_of_one_process_ends_all(config, tmp_path, words, line):
    run = tmp_path / "run"
    ends = finish(start(config, run, processes=2, devices=1, each=([], words)), timeout=60)
    assert [end.code for end in ends] == [2, 2], [end.error for end in ends]
    assert line in ends[0].error.splitlines()[-1]
    assert not (run / "config.json").exists()
