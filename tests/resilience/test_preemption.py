"""The first signal asks, the second ends the process at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from maxlm.resilience import StopRequest

LOOP = """
import sys, time
from maxlm.resilience import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    for step in range(3000):
        time.sleep(0.01)
        if stop.should_stop(step):
            print("saved", flush=True)
            break
"""

# One long call into C, as a compile is: Python handlers do not run until it returns.
BUSY = """
import hashlib
from maxlm.resilience import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)
"""


def start(program):
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_sets_the_flag(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    said = []
    with StopRequest(said.append) as stop:
        assert not stop.should_stop(1) and stop.signal_name is None
        os.kill(os.getpid(), number)
        wait_until(lambda: stop.should_stop(2))
        wait_until(lambda: said)
    assert said == [stop.signal_name] == [number.name]
    assert stop.should_stop(3)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_it_can_be_used_again_and_other_signals_pass():
    for _ in range(2):
        with StopRequest() as stop:
            before = signal.signal(signal.SIGUSR1, lambda *_: None)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
            assert not stop.should_stop(0)
            signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_loop_saves_and_exits_0(number):
    child = start(LOOP)
    child.send_signal(number)
    out, err = child.communicate(timeout=20)
    assert (child.returncode, out) == (0, "saved\n")
    assert err == f"\n{number.name}: saving after this step, then exiting; once more exits at once\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_exits_at_once_inside_a_long_call(number):
    child = start(BUSY)
    child.send_signal(signal.SIGTERM)
    while "exits at once" not in child.stderr.readline():
        pass
    begin = time.monotonic()
    child.send_signal(number)
    assert child.wait(timeout=20) == 128 + number
    assert time.monotonic() - begin < 2
    child.communicate()


@pytest.mark.parametrize("code, deadline", [(0, 0.3), (75, 0.3)])
def test_the_deadline_ends_a_long_call(code, deadline):
    """What cannot be interrupted, such as a compile, ends with the code that the caller decides on."""
    program = BUSY.replace("StopRequest()", f"StopRequest(deadline_seconds={deadline})")
    if code == 0:  # 75 is what it is where nothing was set
        program = program.replace("    print", "    stop.too_late = lambda: 0\n    print")
    child = start(program)
    begin = time.monotonic()
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == code
    assert deadline <= time.monotonic() - begin < deadline + 2
    child.communicate()


def test_one_who_leaves_in_time_is_not_ended():
    child = start(LOOP.replace("StopRequest()", "StopRequest(deadline_seconds=0.5)") + "time.sleep(1)\nsys.exit(9)")
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == 9
    child.communicate()
