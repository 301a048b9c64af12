"""kill -9 inside saves and at random moments never leaves a broken newest checkpoint, nor loses one."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import maxlm

WORKER = pathlib.Path(__file__).with_name("kill_worker.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(pathlib.Path(maxlm.__file__).parents[1])}


def kill(folder, seed, trials):
    command = [sys.executable, "-W", "ignore", WORKER, folder, str(seed), str(trials)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600 + 10 * trials, check=False,
                          env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    hits = json.loads(done.stdout)
    assert hits["trials"] == trials and hits["steps"] > 0
    assert hits["mid_save"] >= trials // 2, "too few kills landed inside a save to prove anything"


def test_kill_inside_saves(tmp_path):
    kill(tmp_path, seed=0, trials=6)


@pytest.mark.slow
def test_kill_inside_saves_many_times(tmp_path):
    kill(tmp_path, seed=1, trials=60)
