"""A run that goes on with other processes and devices: the same tokens always, the same bytes on the same devices.

Each life of a run trains a few steps further than the one before, in its own number of processes; two optimizers,
gradient accumulation, packed rows, and a mixture whose weights change inside a life and exactly between two.
"""

import numpy as np
import pytest

from maxlm.checkpoint import tree_digest
from maxlm.checkpoint.durable import opened
from maxlm.resilience import read_ledger
from tests.multiprocess.launch import train
from tests.training.runs import prepared, write_config

pytestmark = pytest.mark.slow
STEPS = 8
STAGES = ((3, 1.0, 3.0), (6, 0.0, 1.0))  # first step, weights of the two folders
# Weights and their gradients must not hang on the last bit of a tiny second moment, so Adam's eps is large.
SETTINGS = ("train.grad_accumulation=2", "schedule.name=constant", "schedule.warmup_steps=2", "optimizer.eps=1e-4",
            "eval.every_steps=0", "eval.num_batches=1", "logging.sample_prompt=", "checkpoint.every_steps=100",
            "checkpoint.keep_last=10", "model.hidden_dim=32")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    first, second = (str(prepared(folder / name, seed=seed)) for name, seed in (("first", 1), ("second", 2)))
    path = write_config(folder / "tiny.py", folder / "unused")
    stages = ", ".join(
        f"StageConfig({step}, (DatasetConfig({first!r}, {a}), DatasetConfig({second!r}, {b})))" for step, a, b in STAGES
    )
    mixture = f"mixture=(DatasetConfig({first!r}, 2.0), DatasetConfig({second!r})), stages=({stages})"
    path.write_text(path.read_text().replace(f"path={str(folder / 'unused')!r}", mixture))
    return path


def lives(config, run, optimizer, *shapes, mesh=()):
    """Trains to STEPS in as many lives as there are (processes, devices of each), each as many steps as the others."""
    for number, (processes, devices) in enumerate(shapes, 1):
        train(config, run, *SETTINGS, f"optimizer.name={optimizer}", f"train.num_steps={number * STEPS // len(shapes)}",
              *(mesh if processes * devices == 4 else ()), processes=processes, devices=devices)
    return run


def token_stream(run):
    """Digest of each step's batch, made on the device it was trained on."""
    batches = {record["step"]: record["batch"] for record in read_ledger(run).steps()}
    assert sorted(batches) == list(range(1, STEPS + 1))
    return [batches[step] for step in sorted(batches)]


def arrays(run):
    durable = opened(run / "checkpoints")
    return durable.arrays(STEPS, [name for name in durable.document(STEPS)["arrays"] if name.startswith("params/")])


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.exhaustive)])
def test_any_processes_and_devices_train_alike(config, tmp_path, optimizer):
    whole = lives(config, tmp_path / "whole", optimizer, (1, 4))
    elastic = lives(config, tmp_path / "elastic", optimizer, (1, 4), (2, 2), (4, 1), (1, 1))
    assert token_stream(elastic) == token_stream(whole)
    ours, theirs = arrays(elastic), arrays(whole)
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
    start = opened(elastic / "checkpoints").arrays(2, theirs)
    moved = max(float(np.abs(array - start[name]).max()) for name, array in theirs.items())
    assert moved > 1e-3, "the bound above must be far below what training changes"
    again = lives(config, tmp_path / "again", optimizer, (1, 4), (1, 4))
    assert tree_digest(again / "checkpoints") == tree_digest(whole / "checkpoints")


@pytest.mark.parametrize("mesh", [
    (), ("mesh.data=2", "mesh.fsdp=2"), ("mesh.data=2", "mesh.stage=2", "mesh.fsdp=1", "model.num_layers=2"),
], ids=["fsdp", "data x fsdp", "data x stage"])
def test_the_same_devices_in_other_processes_give_the_same_bytes(config, tmp_path, mesh):
    whole = lives(config, tmp_path / "whole", "muon", (2, 2), mesh=mesh)
    elastic = lives(config, tmp_path / "elastic", "muon", (2, 2), (4, 1), mesh=mesh)
    assert token_stream(elastic) == token_stream(whole)
    assert tree_digest(elastic / "checkpoints") == tree_digest(whole / "checkpoints")


def test_stages_are_drawn_from(config, tmp_path):
    """The perturbed twin: without the stages the stream differs exactly from the first of them on."""
    staged = lives(config, tmp_path / "staged", "adamw", (1, 1))
    run = tmp_path / "plain"
    train(config, run, *SETTINGS, "data.stages=[]", f"train.num_steps={STEPS}", processes=1, devices=1)
    ours, theirs = token_stream(staged), token_stream(run)
    assert ours[:3] == theirs[:3] and all(a != b for a, b in zip(ours[3:], theirs[3:], strict=True))
