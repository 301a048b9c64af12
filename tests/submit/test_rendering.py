"""What the submission scripts render, checked against the schemas that its readers publish."""

import copy
import json
import shlex
import shutil
import subprocess
import sys

import jsonschema
import pytest
import yaml

from maxlm.overrides import apply_overrides, load_config
from maxlm.schema import to_dict
from maxlm.submit.slurm import Cluster, array, runs_of
from maxlm.submit.topology import parse_topology
from tests.submit.scripts import GKE, GPU, ROOT, TPU, fake_tool, run, train

TOOLS = {"submit_gke": "kubectl", "submit_tpu_queued": "gcloud", "submit_slurm": "sbatch", "submit_skypilot": "sky"}
PLACES = {
    "submit_gke": [*TPU, *GKE],
    "submit_tpu_queued": [*TPU, "--zone", "us-east5-a"],
    "submit_slurm": [*GPU],
    "submit_skypilot": [*GPU, "--bucket", "/runs=gs://runs"],
}


def schema(name):
    loaded = json.loads((ROOT / "tests" / "golden" / "schemas" / f"{name}.json").read_text())
    return jsonschema.Draft202012Validator(loaded)


def rendered(name, words, monkeypatch, capsys):
    assert run(name, [*words, "--dry-run"], monkeypatch) == 0
    return capsys.readouterr().out


def config_of(*overrides):
    config = apply_overrides(load_config(ROOT / "configs/llama3_70b.py"), ["data.path=/runs/data/web", *overrides])
    return json.loads(json.dumps(to_dict(config)))


MULTISLICE = [*TPU, *GKE, "--slices", "2", "--set", "mesh.data=2", "--queue", "research", "--priority", "high",
              "--namespace", "lm", "--node-selector", "cloud.google.com/gke-spot=true", "--retries", "7"]


def test_jobset_of_two_slices(monkeypatch, capsys):
    manifest = yaml.safe_load(rendered("submit_gke", train(*MULTISLICE), monkeypatch, capsys))
    schema("jobset").validate(manifest)
    metadata, spec = manifest["metadata"], manifest["spec"]
    assert metadata["labels"] == {"kueue.x-k8s.io/queue-name": "research", "kueue.x-k8s.io/priority-class": "high"}
    assert metadata["annotations"] == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert spec["failurePolicy"]["maxRestarts"] == 7
    [slices] = spec["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 32, 32, 0)
    [rule] = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
                                   "cloud.google.com/gke-tpu-topology": "4x4x8", "cloud.google.com/gke-spot": "true"}
    [container] = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert json.loads(container["env"][0]["value"]) == config_of("mesh.data=2")
    host = f"{metadata['name']}-{slices['name']}-0-31"
    assert len(f"{host}-xxxxx") <= 63 and len(metadata["name"]) <= 40


def test_jobset_of_gpu_hosts(monkeypatch, capsys):
    manifest = yaml.safe_load(rendered("submit_gke", train(*GPU, *GKE, "--name", "big"), monkeypatch, capsys))
    schema("jobset").validate(manifest)
    assert "annotations" not in manifest["metadata"] and manifest["metadata"]["labels"] == {}
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    variables = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    assert variables["JAX_COORDINATOR_ADDRESS"] == "big-hosts-0-0.big:1234" and variables["JAX_NUM_PROCESSES"] == "4"


@pytest.mark.parametrize(
    "path, value",
    [
        (("apiVersion",), "jobset.x-k8s.io/v1"),
        (("metadata", "label"), {}),
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "failurePolicy", "maxRestarts"), "3"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
        (("spec", "failurePolicy", "rules", 0, "name"), "never-retried"),
        (("spec", "failurePolicy", "rules", 0, "onJobFailureReasons", 0), "ExitCode"),
        (("spec", "replicatedJobs", 0, "replicas"), "2"),
        (("spec", "replicatedJobs", 0, "template", "spec", "completion"), 2),
        (("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0, "onExitCodes", "values"), 2),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "nodeSelector"), ["tpu"]),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "image"), 1),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "env", 0, "value"), 1),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "volumes", 0, "claim"), {}),
    ],
)
def test_a_perturbed_jobset_is_refused(path, value, monkeypatch, capsys):
    manifest = yaml.safe_load(rendered("submit_gke", train(*MULTISLICE), monkeypatch, capsys))
    assert schema("jobset").is_valid(manifest) and not schema("jobset").is_valid(perturbed(manifest, path, value))


def perturbed(document, path, value):
    """A copy of `document` that has `value` at `path`."""
    document = copy.deepcopy(document)
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return document


def test_skypilot(monkeypatch, capsys):
    words = train(*GPU, "--bucket", "/runs=gs://runs", "--spot", "--infra", "gcp/us-east5", "--setup", "date",
                  "--image", "registry/maxlm:1")
    task = yaml.safe_load(rendered("submit_skypilot", words, monkeypatch, capsys))
    schema("skypilot").validate(task)
    assert task["num_nodes"] == 4 and task["resources"]["accelerators"] == "H100:8"
    assert json.loads(task["envs"]["MAXLM_CONFIG"]) == config_of()
    for path, value in ((("num_node",), 4), (("num_nodes",), "4"), (("resources", "accelerator"), "H100"),
                        (("envs", "a-b"), "c"), (("resources", "job_recovery", "max_restarts_on_errors"), "never"),
                        (("resources", "infra"), 5), (("file_mounts", "/runs", "modes"), "MOUNT")):
        assert not schema("skypilot").is_valid(perturbed(task, path, value)), path
    pods = train(*TPU, "--bucket", "/runs=gs://runs")
    task = yaml.safe_load(rendered("submit_skypilot", pods, monkeypatch, capsys))
    schema("skypilot").validate(task)
    assert task["num_nodes"] == 1 and task["resources"]["accelerators"] == "tpu-v5p-256"


def test_queued_resources(monkeypatch, capsys, tmp_path):
    words = train(*TPU, "--slices", "2", "--set", "mesh.data=2", "--zone", "us-east5-a", "--project", "lm", "--spot",
                  "--image", "registry/maxlm:1", "--mount", "/runs", "--setup", "mount ADDRESS:/runs /runs",
                  "--gcloud=--valid-until-duration=6h", "--name", "big")
    shell = rendered("submit_tpu_queued", words, monkeypatch, capsys)
    heard = fake_tool(tmp_path, "gcloud")
    subprocess.run(["bash", "-c", f"PATH={tmp_path}:$PATH\n{shell}"], check=True, cwd=tmp_path)
    command, script = heard.read_text().split("\n", 1)
    assert shlex.split(command) == [
        "compute", "tpus", "queued-resources", "create", "big", "--zone=us-east5-a", "--project=lm",
        "--accelerator-type=v5p-256", "--runtime-version=v2-alpha-tpuv5", "--node-count=2", "--node-prefix=big",
        "--spot", "--metadata-from-file=startup-script=startup.sh", "--async", "--valid-until-duration=6h"]
    assert script.startswith("#!/bin/bash") and "mount ADDRESS:/runs /runs\n" in script
    assert "docker run --rm --init --privileged --net=host --env=MAXLM_CONFIG" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "queued-resources delete big" in shell


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
@pytest.mark.slow
def test_gcloud_knows_these_options(monkeypatch, capsys):
    """Asked of gcloud's own help, which needs no account."""
    words = train(*TPU, "--zone", "us-east5-a", "--project", "lm", "--spot", "--slices", "2", "--set", "mesh.data=2")
    shell = rendered("submit_tpu_queued", words, monkeypatch, capsys)
    lines = [line for line in shell.splitlines() if "gcloud compute tpus" in line]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line[line.index("gcloud compute"):])
        text = subprocess.run([*words[:5], "--help"], capture_output=True, text=True).stdout
        assert [word for word in words[6:] if word.partition("=")[0] not in text] == []


def test_slurm(monkeypatch, capsys):
    words = train(*GPU, "--partition", "gpu", "--time", "1-00:00", "--cpus-per-task", "12", "--sbatch=--qos=high",
                  "--setup", "module load cuda", "--image", "registry/maxlm:1", "--mount", "/runs")
    script = rendered("submit_slurm", words, monkeypatch, capsys)
    options = [line.split()[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert options[1:] == [
        "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu", "--time=1-00:00",
        "--cpus-per-task=12", "--output=/runs/70b.log", "--open-mode=append", "--requeue", "--signal=TERM@150",
        "--qos=high"]
    assert ("srun --wait=120 --kill-on-bad-exit=0 --cpus-per-task=12 --container-image=registry/maxlm:1 "
            "--container-mounts=/runs:/runs bash -c ") in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_slurm_array():
    script = array("sweep", ["a", "b", "it's"], "/out", parse_topology("h100:1x1"), Cluster(), retries=2,
                   grace_seconds=60, at_a_time=2)
    assert "#SBATCH --array=0-2%2\n" in script and runs_of(script) == ["a", "b", "it's"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    "name, words, complaint",
    [
        ("submit_gke", [*TPU, *GKE, "--slices", "2"], "mesh.data=1 must be a multiple of --slices 2"),
        ("submit_gke", [*TPU, *GKE, "--set", "mesh.tensor=3"], "does not divide the 128 devices"),
        ("submit_gke", [*TPU, *GKE, "--set", "mesh.fsdp=64"], "needs 64 devices but there are 128"),
        ("submit_gke", [*TPU, *GKE, "--set", "train.global_batch_size=100"], "is not a multiple of"),
        ("submit_gke", [*TPU, *GKE, "--set", "data.path=none"], "names no data"),
        ("submit_gke", [*TPU, *GKE, "--set", "model.layers=1"], "unknown config key 'model.layers'"),
        ("submit_gke", [*TPU, *GKE, "--name", "Big"], "--name Big must be at most"),
        ("submit_gke", [*TPU, "--claim", "runs:/runs"], "--image is needed"),
        ("submit_gke", [*TPU, "--image", "i", "--claim", "other:/other"], "would be lost with the job: mount a volume"),
        ("submit_gke", [*TPU, "--image", "i", "--claim", "runs"], "must be NAME:/PATH"),
        ("submit_gke", ["--topology", "cpu:1x2", *GKE], "not for this scheduler, which has TPUs and GPUs"),
        ("submit_gke", [*GPU, *GKE, "--slices", "2", "--set", "mesh.data=2"], "--slices 2 is for TPUs"),
        ("submit_gke", ["--topology", "v6e:2x4", *GKE, "--slices", "2", "--set", "mesh.data=2"], "is one host"),
        ("submit_gke", [*GKE], "--topology is needed"),
        ("submit_slurm", [*TPU], "not for this scheduler, which has GPUs and CPUs"),
        ("submit_slurm", [*GPU, "--mount", "/runs"], "--mount is for --image"),
        ("submit_slurm", [*GPU, "--image", "i"], "would be lost with the job: let the container see"),
        ("submit_tpu_queued", [*TPU, "--zone", "z", "--image", "i", "--mount", "/run"], "let the container see"),
        ("submit_slurm", [*GPU, "--retries", "-1"], "--retries -1 must be 0 or more"),
        ("submit_tpu_queued", ["--topology", "v5p:4x8x16", "--zone", "z"], "ask for v5p:8x8x8"),
        ("submit_skypilot", [*GPU], "would be lost with the job: mount a bucket"),
        ("submit_skypilot", [*TPU, "--slices", "2", "--set", "mesh.data=2"], "SkyPilot has no multislice"),
        ("submit_skypilot", [*GPU, "--bucket", "/runs"], "must be /PATH=URL"),
    ],
)
def test_mistakes_are_one_line(name, words, complaint, monkeypatch, capsys):
    assert run(name, train(*words), monkeypatch) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


@pytest.mark.parametrize("name, tool", list(TOOLS.items()))
def test_the_tool_is_called(name, tool, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", "/usr/bin-without-tools")
    words = [word.replace("/runs", str(tmp_path)) for word in train(*PLACES[name])]
    assert run(name, words, monkeypatch) == 2
    assert f"{tool} is not on this machine" in capsys.readouterr().err
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    heard = fake_tool(tmp_path, tool, says="submitted\n")
    assert run(name, words, monkeypatch) == 0
    assert capsys.readouterr().out.startswith("submitted\n")
    assert "MAXLM_CONFIG" in heard.read_text()
    fake_tool(tmp_path, tool, code=1)
    assert run(name, words, monkeypatch) == 2
    assert "failed: exit code 1" in capsys.readouterr().err


def test_nothing_starts_jax():
    code = ("import sys, maxlm.submit.gke, maxlm.submit.queued, maxlm.submit.skypilot, maxlm.submit.slurm; "
            "print(*[m for m in ('jax', 'numpy', 'yaml') if m in sys.modules])")
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (child.returncode, child.stdout.strip()) == (0, "")
