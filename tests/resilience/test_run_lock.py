"""One run directory, one run."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from maxlm.resilience import RunLock
from maxlm.schema import ConfigError

HOLD = """
import sys, time
from maxlm.resilience.run_lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder, program=HOLD):
    holder = subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_second_process_is_told_who_holds_it_until_kill_9(tmp_path):
    with hold(tmp_path / "run") as holder:
        with pytest.raises(ConfigError) as caught, RunLock(tmp_path / "run"):
            pass
        message = str(caught.value)
        assert f"process {holder.pid} on host {socket.gethostname()}" in message and "choose another" in message
        assert "\n" not in message
        with RunLock(tmp_path / "run", process_index=1):  # another process of the same run takes no lock
            pass
        holder.send_signal(signal.SIGKILL)
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()


def test_lock_is_released_on_exit_and_cannot_be_taken_twice(tmp_path):
    with RunLock(tmp_path):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on host"), RunLock(tmp_path):
            pass
    with RunLock(tmp_path):
        pass


def test_a_forked_child_does_not_outlive_the_lock(tmp_path):
    program = HOLD.replace('    print("held"', """    import os
    if os.fork() == 0:
        print("held", flush=True)
        time.sleep(3)
        os._exit(0)
    time.sleep(60)
    print("held\"""")
    with hold(tmp_path, program) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with RunLock(tmp_path):  # while the child still sleeps
            pass


def test_an_unreadable_holder_is_still_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(ConfigError, match="in use by another process"), RunLock(tmp_path):
            pass


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=f"--run-dir {run_dir} cannot be used .*: choose a folder"):
            with RunLock(run_dir):
                pass


@contextlib.contextmanager
def read_only_folder(folder):
    """Root writes through permissions, so it gets a read-only mount, or /sys where it may not mount."""
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o555)
        yield folder
    elif subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode:
        yield pathlib.Path("/sys")
    else:
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)


def test_read_only_folder_is_one_line(tmp_path):
    with read_only_folder(tmp_path / "run") as run_dir:
        with pytest.raises(ConfigError, match="cannot be used .*: choose a folder that you can write"):
            with RunLock(run_dir):
                pass
