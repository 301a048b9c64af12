"""The Slurm path for real: a cluster of this machine alone, jobs as they are submitted, runs that are stopped, killed
and mistaken."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

import maxlm
from maxlm.resilience import read_ledger
from tests.multiprocess.launch import with_devices
from tests.submit.one_machine_slurm import CannotStart, cluster
from tests.submit.scripts import ROOT
from tests.training.runs import prepared, rows_of, write_config

pytestmark = pytest.mark.slow
SETTINGS = ("logging.tensorboard=false", "logging.sample_prompt=", "checkpoint.every_steps=20", "eval.num_batches=1",
            "eval.every_steps=0", "schedule.name=constant")
MAXLM = """#!{python}
import sys
sys.argv[0] = "{program}"
exec(compile(open("{program}").read(), "{program}", "exec"))
"""


@pytest.fixture(scope="module")
def slurm():
    """The environment of a user of the cluster. In a folder with a short path: sockets have short names."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with cluster(folder) as environment:
            tools = folder / "bin"
            tools.mkdir()
            program = ROOT / "tests" / "multiprocess" / "keep_programs.py"
            (tools / "maxlm").write_text(MAXLM.format(python=sys.executable, program=program))
            (tools / "maxlm").chmod(0o755)
            yield {**with_devices(1), **environment, "XLA_FLAGS": with_devices(1)["XLA_FLAGS"],
                   "PYTHONPATH": str(pathlib.Path(maxlm.__file__).parents[1]), "PATH": f"{tools}:{os.environ['PATH']}"}
    except CannotStart as reason:
        pytest.skip(f"no Slurm here: {reason}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    return write_config(folder / "tiny.py", prepared(folder / "data"))


def submit(slurm, config, run, *overrides):
    """Submits a run of two tasks; the job's number."""
    sets = [word for override in (*SETTINGS, *overrides) for word in ("--set", override)]
    said = subprocess.run([sys.executable, ROOT / "scripts" / "submit_slurm.py", config, "--run-dir", run, "--topology",
                           "cpu:1x2", "--retries", "2", *sets], env=slurm, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return said.stdout.split()[-1]


def state(slurm, job):
    """{'JobState': 'RUNNING', 'Restarts': '0', 'ExitCode': '0:0', ...}"""
    said = subprocess.run(["scontrol", "show", "job", job], env=slurm, capture_output=True, text=True).stdout
    return dict(word.partition("=")[::2] for word in said.split() if "=" in word)


def wait(ready, log, seconds=240):
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, log.read_text(errors="replace") if log.exists() else "nothing was said"
        time.sleep(0.1)


def steps(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def test_stopped_killed_and_done(slurm, config, tmp_path):
    """SIGTERM to the tasks, as at a time limit: saved, and put back into the queue. kill -9 of one: started again in
    the same allocation. Then to the end, where nothing was lost."""
    run, log = tmp_path / "run", tmp_path / "run.log"
    job = submit(slurm, config, run, "train.num_steps=400")
    wait(lambda: steps(run) >= 5, log)
    subprocess.run(["scancel", "--signal=TERM", job], env=slurm, check=True)
    wait(lambda: state(slurm, job)["Restarts"] == "1", log)
    stopped = rows_of(run)[-1]
    assert stopped["preempted"] is True and not (run / "DONE").exists()
    wait(lambda: steps(run) >= stopped["step"] + 25, log)
    assert f"resumed from step {stopped['step']}" in log.read_text()
    kill_one(run)
    wait(lambda: "starting again, 1 of 2" in log.read_text(), log)
    wait(lambda: state(slurm, job)["JobState"] in ("COMPLETED", "FAILED"), log)
    ended = state(slurm, job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), log.read_text()
    assert (run / "DONE").read_text() == "400\n"
    assert sorted({record["step"] for record in read_ledger(run).steps()}) == list(range(1, 401))


def kill_one(run):
    """kill -9 of one of the two processes that train `run`."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train" in words and str(run).encode() in words:
            found.append(int(process.name))
    assert len(found) == 2, found
    os.kill(max(found), 9)


def test_a_mistake_is_not_tried_again(slurm, config, tmp_path):
    run, log = tmp_path / "run", tmp_path / "run.log"
    job = submit(slurm, config, run, "data.path=/nowhere")
    wait(lambda: state(slurm, job)["JobState"] in ("COMPLETED", "FAILED"), log)
    ended = state(slurm, job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    said = log.read_text()
    assert "data.path='/nowhere' does not exist" in said and "starting again" not in said


SWEEP = '''
from pathlib import Path
from maxlm.overrides import load_config
from maxlm.scaling.grid import *

BASE = load_config(Path(__file__).with_name("tiny.py"))


def sweep():
    ladder = trunk_and_branches(BASE, (8, 12), decay_fraction=0.5, save_every=2)
    return Sweep(trials(BASE, [*ladder, {"name": "other", "optimizer.learning_rate": 3e-3},
                               {"name": "wrong", "data.path": "/nowhere"}]))
'''


def test_a_sweep_is_an_array(slurm, config, tmp_path):
    """The same command submits, waits its turn, submits what is left, and gathers."""
    (config.parent / "sweep.py").write_text(SWEEP)
    out = tmp_path / "out"

    def sweep():
        words = ["sweep", str(config.parent / "sweep.py"), "--out", str(out), "--launcher", "slurm", "--topology",
                 "cpu:1x1", "--jobs", "2"]
        return subprocess.run([sys.executable, "-m", "maxlm", *words], env=slurm, capture_output=True, text=True)

    def queue():
        return subprocess.run(["squeue", "--noheader", "--array"], env=slurm, capture_output=True,
                              text=True).stdout.splitlines()

    first = sweep()
    assert first.returncode == 0 and "0 results" in first.stdout, first.stderr
    assert "3 queued, 2 waiting" in first.stdout and "steps8 waiting: its trunk trunk comes first" in first.stderr
    assert len(queue()) == 3
    wait(lambda: not queue(), out / "logs" / "trunk.log")
    second = sweep()
    assert second.returncode == 0 and "1 results" in second.stdout and "3 queued" in second.stdout, second.stderr
    assert "wrong queued: submitted again; before, it said: data.path='/nowhere' does not exist" in second.stderr
    wait(lambda: not queue(), out / "logs" / "steps12.log")
    last = sweep()
    assert "3 results" in last.stdout, last.stderr
    rows = {row["run"]: row for row in map(json.loads, (out / "runs.jsonl").read_text().splitlines())}
    assert rows.keys() == {"steps8", "steps12", "other"} and rows["steps12"]["step"] == 12
    assert "wrong" in last.stderr
