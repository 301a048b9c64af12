"""Sweeps on clusters, with schedulers that only write down what they are given and say what they are told to."""

import json

import jsonschema
import pytest
import yaml

from maxlm.cli import main
from maxlm.submit.slurm import runs_of
from tests.submit.scripts import ROOT, fake_tool
from tests.training.runs import write_config

SWEEP = '''
from pathlib import Path
from maxlm.overrides import load_config
from maxlm.scaling.grid import *

BASE = load_config(Path(__file__).with_name("base.py"))


def sweep():
    ladder = trunk_and_branches(BASE, (8, 12), decay_fraction=0.5, save_every=2)
    return Sweep(trials(BASE, [*ladder, {"name": "a_b", "train.seed": 1}, {"name": "c", "train.seed": 2}]))
'''
SLURM = ("--launcher", "slurm", "--topology", "h100:1x1")


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Runs `maxlm sweep WORDS`: (exit code, stdout, stderr). Attributes: OUT, and what a tool says and has heard."""
    config = write_config(tmp_path / "base.py", tmp_path / "data")
    (tmp_path / "sweep.py").write_text(SWEEP)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def run(*words):
        code = main(["sweep", str(config.with_name("sweep.py")), "--out", str(tmp_path / "out"), *words])
        return code, *capsys.readouterr()

    run.out, run.tool = tmp_path / "out", lambda *words, **more: fake_tool(tmp_path, *words, **more)
    return run


def finish(out, *names):
    for name in names:
        (out / "runs" / name).mkdir(parents=True)
        (out / "runs" / name / "DONE").write_text("8\n")
        row = {"step": 8, "tokens": 100, "eval_loss": 3.0}
        (out / "runs" / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def test_slurm_gets_what_is_left(sweep):
    finish(sweep.out, "c")
    sweep.tool("squeue")
    heard = sweep.tool("sbatch", says="Submitted batch job 1\n")
    code, said, error = sweep(*SLURM, "--jobs", "2", "--partition", "gpu")
    assert code == 0 and "2 queued, 2 waiting" in said, error
    assert "steps8 waiting: its trunk trunk comes first" in error and "c done" in error
    script = heard.read_text()
    assert runs_of(script) == ["trunk", "a_b"] and "#SBATCH --array=0-1%2\n" in script
    assert "#SBATCH --partition=gpu\n" in script and "#SBATCH --gpus-per-node=1\n" in script
    name = next(line for line in script.splitlines() if "--job-name=" in line).partition("=")[2]
    sweep.tool("squeue", says=f"{name}|0|RUNNING\n{name}|1|PENDING\nother|0|RUNNING\nplain|N/A|RUNNING\n")
    heard.unlink()
    code, said, error = sweep(*SLURM)
    assert code == 0 and "1 running, 1 queued, 2 waiting" in said and not heard.exists(), error


def test_gke_gets_a_jobset_a_run(sweep, tmp_path):
    finish(sweep.out, "trunk", "c")
    (sweep.out / "runs/trunk/checkpoints/4").mkdir(parents=True)
    (sweep.out / "runs/trunk/checkpoints/6").mkdir()
    (sweep.out / "runs/trunk/ledger.jsonl").touch()
    words = ("--launcher", "gke", "--topology", "v6e:2x4", "--image", "registry/maxlm:1", "--queue", "research",
             "--claim", f"sweeps:{tmp_path}", "--namespace", "lm")
    heard = sweep.tool("kubectl", says='{"items": []}')
    code, said, error = sweep(*words)
    assert code == 0 and "3 queued" in said, error
    command, text = heard.read_text().split("\n", 1)
    assert command == "create -f -"
    manifests = list(yaml.safe_load_all(text))
    schema = json.loads((ROOT / "tests/golden/schemas/jobset.json").read_text())
    for manifest in manifests:
        jsonschema.Draft202012Validator(schema).validate(manifest)
    names = [manifest["metadata"]["name"] for manifest in manifests]
    assert [name[:-7] for name in names] == ["steps8", "steps12", "a-b"] and len(set(names)) == 3
    labels = manifests[0]["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "research" and labels.keys() == {
        "maxlm/sweep", "kueue.x-k8s.io/queue-name"}
    pod = manifests[2]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert f"--run-dir {sweep.out}/runs/a_b" in pod["containers"][0]["command"][2]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "8"}
    assert (sweep.out / "runs/steps8/.sweep-start").exists()  # the trunk's checkpoint is there
    items = [{"metadata": {"name": names[0]}, "spec": {"suspend": True}},
             {"metadata": {"name": names[1]}, "spec": {}, "status": {}},
             {"metadata": {"name": names[2]}, "spec": {}, "status": {"terminalState": "Completed"}}]
    finish(sweep.out, "a_b")
    heard = sweep.tool("kubectl", says=json.dumps({"items": items}))
    code, said, error = sweep(*words)
    assert code == 0 and "2 results" in said and "1 running, 1 queued" in said, error
    assert heard.read_text().startswith("get jobsets.jobset.x-k8s.io --namespace=lm --output=json --selector=maxlm/")


@pytest.mark.parametrize(
    "words, complaint",
    [
        (("--launcher", "slurm"), "--topology is needed"),
        (("--launcher", "slurm", "--topology", "v5p:4x4x8"), "which has GPUs and CPUs"),
        (("--launcher", "slurm", "--topology", "h100:2x8"), "run trunk: train.global_batch_size"),
        ((*SLURM, "--packed", "2"), "--packed is for --launcher local"),
        ((*SLURM, "--chip", "NVIDIA H200", "--dry-run"), "--topology names slurm's chip"),
        ((*SLURM,), "squeue is not on this machine"),
        (("--launcher", "gke", "--topology", "v6e:2x4", "--image", "i"), "would be lost with the job"),
        (("--launcher", "gke", "--topology", "v6e:2x4"), "--image is needed"),
        (("--launcher", "gke", "--topology", "v6e:2x4", "--image", "i", "--jobs", "2"), "--jobs is not for"),
        ((*SLURM, "--queue", "research"), "--queue is not for --launcher slurm"),
        (("--topology", "h100:1x1"), "--topology is not for --launcher local"),
    ],
)
def test_mistakes_are_one_line(sweep, words, complaint, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, error = sweep(*words)
    assert code == 2 and complaint in error and error.count("\n") == 1, error


def test_the_plan_comes_with_what_is_submitted(sweep):
    code, said, error = sweep(*SLURM, "--dry-run")
    assert code == 0 and "5 runs" in said and "on h100:1x1" in said and not sweep.out.exists(), error
    assert runs_of(said) == ["trunk", "steps8", "steps12", "a_b", "c"]
