"""`maxlm sweep`: real runs of tiny models, killed and gone on with; and the launcher's rules on processes that only
exit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from maxlm.config import CheckpointConfig, ModelConfig, RunConfig, ScheduleConfig, TrainConfig
from maxlm.scaling.cost import Device
from maxlm.scaling.grid import Sweep, trials
from maxlm.scaling.launcher import LocalLauncher
from maxlm.scaling.sweep import SweepFolder, metrics
from maxlm.schema import to_dict
from tests.training.runs import command, prepared, start, write_config

SWEEP = '''
from pathlib import Path
from maxlm.config import *
from maxlm.overrides import load_config
from maxlm.scaling.grid import *

BASE = load_config(Path(__file__).with_name("base.py"))


def sweep():
    ladder = trunk_and_branches(BASE, (8, 12), decay_fraction=0.5, save_every=2)
    whole = {**ladder[2], "name": "whole"}
    del whole["branch_of"], whole["from_step"]
    return Sweep(trials(BASE, [*ladder, whole, EXTRA]))
'''
EXTRA = '{"name": "too-narrow", "model.vocab_size": 100}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    config = write_config(folder / "base.py", prepared(folder / "data"))
    text = config.read_text().replace('logging=LoggingConfig(every_steps=1, sample_prompt="the ")',
                                      "logging=LoggingConfig(every_steps=1, tensorboard=False)")
    config.write_text(text)
    (folder / "sweep.py").write_text(SWEEP.replace("EXTRA", EXTRA))
    return folder


def rows(out, name="runs.jsonl"):
    return {row["run"]: row for row in map(json.loads, (out / name).read_text().splitlines())}


def digest(run):
    return command(["checkpoint", "digest", run])[1].split()[-1]


@pytest.fixture(scope="module")
def swept(folder):
    return folder / "out", command(["sweep", folder / "sweep.py", "--out", folder / "out", "--jobs", "2"])


def test_runs_are_trained_and_collected(swept):
    out, (code, said, error) = swept
    assert code == 2 and "3 results in" in said, error
    found = rows(out)
    assert found.keys() == {"steps8", "steps12", "whole"}
    row = found["steps12"]
    assert row["step"] == 12 and row["tokens"] > 2000 and row["flops"] > 1e6 and row["params"] > 1000
    assert row["unique_tokens"] <= row["tokens"] and row["seconds"] > 0 and row["schedule.decay_steps"] == 6
    assert "[3/5]" in error or "[4/5]" in error


def test_a_config_error_is_reported_and_not_tried_again(swept):
    _, (_, _, error) = swept
    assert error.count("too-narrow running") == 1
    assert "1 of 5 runs failed, first too-narrow: model.vocab_size=100 is smaller" in error


def test_a_branch_is_the_run_that_was_never_interrupted(swept):
    out, _ = swept
    assert digest(out / "runs/steps12") == digest(out / "runs/whole") != digest(out / "runs/steps8")
    found = rows(out)
    assert found["steps12"]["loss"] == found["whole"]["loss"] != found["steps8"]["loss"]
    assert (out / "runs/trunk/checkpoints/6").is_dir() and "trunk" in rows(out, "curves.jsonl")


def test_finished_runs_are_not_started_again(swept, folder):
    out, _ = swept
    before = (out / "runs/whole/metrics.jsonl").stat().st_mtime_ns
    (folder / "fewer.py").write_text(SWEEP.replace(", EXTRA", ""))
    code, said, error = command(["sweep", folder / "fewer.py", "--out", out])
    assert (code, "running" in error) == (0, False) and "3 results" in said
    assert (out / "runs/whole/metrics.jsonl").stat().st_mtime_ns == before
    (folder / "other.py").write_text(SWEEP.replace(", EXTRA", "").replace("(8, 12)", "(8, 14)"))
    code, _, error = command(["sweep", folder / "other.py", "--out", out])
    assert code == 2 and "train.num_steps" in error and len(error.strip().splitlines()) == 1


def test_the_plan_names_every_run_and_refuses_what_cannot_fit(folder):
    code, said, _ = command(["sweep", folder / "sweep.py", "--out", folder / "none", "--dry-run"])
    assert code == 0 and all(name in said for name in ("trunk", "steps8", "steps12", "whole", "5 runs", "after trunk"))
    assert not (folder / "none").exists()
    large = SWEEP.replace("EXTRA", '{"name": "large", "model.vocab_size": 2**32}')
    (folder / "large.py").write_text(large)
    code, _, error = command(["sweep", folder / "large.py", "--out", folder / "none", "--dry-run", "--chip", "TPU v5e"])
    assert code == 2 and "run large needs about" in error


@pytest.mark.slow
def test_packed_runs_end_like_runs_alone(folder):
    """Three of one program in one process, one that is not, and the first of them again by itself."""
    out = folder / "packed"
    (folder / "grid.py").write_text(SWEEP.split("def sweep")[0] + """
def sweep():
    points = [{"name": "a"}, {"name": "b", "optimizer.learning_rate": 3e-3}, {"name": "c", "train.seed": 1},
              {"name": "other", "train.num_steps": 4}]
    return Sweep(trials(BASE, points))
""")
    code, _, error = command(["sweep", folder / "grid.py", "--out", out, "--packed", "8"])
    assert code == 0, error
    found = rows(out)
    assert found.keys() == {"a", "b", "c", "other"} and len({row["loss"] for row in found.values()}) == 4
    assert not (out / "runs/a/checkpoints").exists() and (out / "runs/other/checkpoints").exists()
    code, _, error = command(["train", out / "configs/c.json", "--run-dir", folder / "alone"])
    assert code == 0, error
    packed, alone = (metrics(run) for run in (out / "runs/c", folder / "alone"))
    for key in ("loss", "eval_loss", "eval_bits_per_byte", "learning_rate", "grad_norm", "tokens"):
        values = [[row[key] for row in table if key in row] for table in (packed, alone)]
        assert len(values[0]) >= 2 and values[0] == pytest.approx(values[1], rel=2e-4), key


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a launcher's death reaches its runs on Linux")
def test_after_kill_9_the_same_command_goes_on(folder):
    out = folder / "killed"
    (folder / "long.py").write_text(
        SWEEP.replace(", EXTRA", "").replace("(8, 12)", "(40, 80)").replace("save_every=2", "save_every=10"))
    launcher = start(["sweep", folder / "long.py", "--out", out, "--jobs", "2"])
    written = out / "runs/trunk/metrics.jsonl"
    while not (written.exists() and written.read_text().count("\n") > 30):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.1)
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    assert not (out / "runs/trunk/DONE").exists()
    code, said, error = command(["sweep", folder / "long.py", "--out", out, "--jobs", "2"])  # waits for them to stop
    assert code == 0 and "3 results" in said, error
    assert "resumed from step" in (out / "logs/trunk.log").read_text()
    assert digest(out / "runs/steps80") == digest(out / "runs/whole")


# --- the launcher's rules, on processes that only exit --------------------------------------------------------------

BASE = RunConfig(model=ModelConfig(num_layers=1, hidden_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32),
                 train=TrainConfig(num_steps=4), schedule=ScheduleConfig(warmup_steps=1),
                 checkpoint=CheckpointConfig(every_steps=2))


class Scripted(LocalLauncher):
    """Runs that exit with the next code of their list; 'done' marks the run as done and exits with 0."""

    def __init__(self, codes, **options):
        super().__init__(Device("cpu", "cpu", 2**33, 1e11), 1, **options)
        self.codes, self.most, self.living = {name: list(given) for name, given in codes.items()}, 0, []

    def _spawn(self, folder, job):
        code = self.codes[job.trial.name].pop(0)
        run = folder.run_dir(job.trial)
        run.mkdir(parents=True, exist_ok=True)
        done = f"open({str(run / 'DONE')!r}, 'w');" if code == "done" else ""
        folder.log(job.trial).write_text("the last word\n")
        self.living = [p for p in self.living if p.poll() is None]
        program = f"import sys;{done}sys.exit({0 if done else code})"
        self.living.append(subprocess.Popen([sys.executable, "-c", program]))
        self.most = max(self.most, len(self.living))
        return self.living[-1]


def launch(tmp_path, codes, jobs=1, points=None):
    sweep = Sweep(trials(BASE, points or [{"name": name} for name in codes]))
    launcher = Scripted(codes, jobs=jobs)
    with SweepFolder(tmp_path, sweep) as folder:
        folder.write_configs()
        return launcher.run(folder), launcher


def test_what_is_tried_again(tmp_path):
    jobs, launcher = launch(tmp_path, {
        "fine": ["done"], "preempted": [0, "done"], "hung": [75, 75, 75, 75, "done"], "crashed": [1, -9, "done"],
        "hopeless": [1, 1, 1, "done"], "mistaken": [2, "done"], "unsafe": [3, "done"]}, jobs=3)
    assert {name: job.state for name, job in jobs.items()} == {
        "fine": "done", "preempted": "done", "hung": "done", "crashed": "done", "hopeless": "failed",
        "mistaken": "failed", "unsafe": "failed"}
    assert jobs["mistaken"].starts == jobs["unsafe"].starts == 1 and jobs["mistaken"].reason == "the last word"
    assert "exit code 1, 3 times: the last word" in jobs["hopeless"].reason
    assert 1 < launcher.most <= 3


def test_a_branch_of_a_failed_trunk_is_not_started(tmp_path):
    points = [{"name": "trunk"}, {"name": "branch", "branch_of": "trunk", "from_step": 2}]
    jobs, _ = launch(tmp_path, {"trunk": [2], "branch": []}, points=points)
    assert jobs["branch"].state == "failed" and jobs["branch"].reason == "its trunk trunk failed"


def test_configs_are_whole_and_corpora_are_shared(tmp_path):
    named = {"data.source": "python-stdlib", "data.tokenizer": "bytes"}
    sweep = Sweep(trials(BASE, [{"name": "a", **named}, {"name": "b", **named}, {"name": "c"}]))
    with SweepFolder(tmp_path, sweep) as folder:
        folder.write_configs()
        (path, words), = folder.corpora().items()
        written = json.loads(folder.config_file(sweep.trials[0]).read_text())
    assert words[:4] == ["data", "prepare", "--source", "python-stdlib"]
    assert written["data"]["path"] == str(path.absolute()) and written["data"]["source"] is None
    assert json.loads((tmp_path / "configs/c.json").read_text()) == json.loads(json.dumps(to_dict(BASE)))


def test_one_sweep_at_a_time_uses_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("maxlm.scaling.sweep.LOCK_SECONDS", 0.3)
    sweep = Sweep(trials(BASE, [{"name": "a"}]))
    with SweepFolder(tmp_path, sweep), pytest.raises(ValueError, match="is in use by another"):
        SweepFolder(tmp_path, sweep).__enter__()
    with SweepFolder(tmp_path, sweep) as folder:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], pass_fds=(folder.lock,))
    try:
        with pytest.raises(ValueError, match="is in use by another"):  # a run of it still lives
            SweepFolder(tmp_path, sweep).__enter__()
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert pathlib.Path(tmp_path).is_dir()
