"""A fault that was injected is located to its step and its cause."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from maxlm.checkpoint import Checkpointer, read_meta, restore_state
from maxlm.cli import main
from maxlm.config import DatasetConfig
from maxlm.data.loader import TrainingData
from maxlm.data.places import RowPlaces
from maxlm.overrides import apply_overrides, load_config
from maxlm.parallel.mesh import make_mesh
from maxlm.training.loop import train
from maxlm.training.state import abstract_state
from tests.training.runs import prepared, write_config
from tests.training.test_step_ledger import flip_a_bit_before_step

SETTINGS = ("logging.tensorboard=false", "eval.every_steps=0", "eval.num_batches=1", "logging.sample_prompt=",
            "resilience.digest_every_steps=1", "checkpoint.keep_last=9")
ONE = slice(0, 1)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Eight rows a batch out of shards of ten rows and fewer."""
    folder = tmp_path_factory.mktemp("config")
    path = write_config(folder / "tiny.py", prepared(folder / "data", shard_rows=10))
    return apply_overrides(load_config(path), SETTINGS)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(config, run, devices=jax.devices()[ONE])
    return run


def replayed(run, step, capsys):
    """(exit code, result) of the command."""
    capsys.readouterr()
    code = main(["replay", "--run-dir", str(run), "--step", str(step)])
    return code, json.loads(capsys.readouterr().out)


def open_data(config):
    return TrainingData([DatasetConfig(config.data.path)], seq_len=config.train.seq_len,
                        global_batch_size=config.train.global_batch_size, seed=config.train.seed)


@pytest.mark.parametrize(("step", "start"), [(1, 0), (4, 2), (6, 4)])
def test_a_sound_run_agrees(whole, capsys, step, start):
    code, result = replayed(whole, step, capsys)
    assert (code, result["agrees"], result["from_checkpoint"]) == (0, True, start), result


@pytest.mark.slow
def test_a_sound_run_on_a_mesh_agrees(config, tmp_path, capsys):
    other = apply_overrides(config, ["mesh.data=2", "train.num_steps=3", "schedule.warmup_steps=1"])
    train(other, tmp_path, devices=jax.devices()[:4])
    code, result = replayed(tmp_path, 3, capsys)
    assert (code, result["agrees"], result["from_checkpoint"]) == (0, True, 2), result


def test_a_step_that_was_not_made_is_refused(whole, tmp_path, capsys):
    assert main(["replay", "--run-dir", str(whole), "--step", "7"]) == 2
    assert "it has steps 1 to 6" in capsys.readouterr().err
    assert main(["replay", "--run-dir", str(tmp_path), "--step", "1"]) == 2


def test_a_bit_flipped_in_memory_is_computation(config, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        flip_a_bit_before_step(4, patch, at_call=4)
        train(config, tmp_path, devices=jax.devices()[ONE])
    assert replayed(tmp_path, 3, capsys)[1]["agrees"]
    code, result = replayed(tmp_path, 4, capsys)
    assert (code, result["cause"], result["at_step"]) == (3, "computation", 4), result
    assert "the run's own computation went wrong" in result["detail"]
    assert replayed(tmp_path, 6, capsys)[1]["agrees"], "from the checkpoint of step 4, which has the fault in it, on"
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    code, result = replayed(tmp_path, 6, capsys)
    assert (code, result["cause"], result["at_step"], result["from_checkpoint"]) == (3, "computation", 4, 2)


def test_a_bit_flipped_in_a_checkpoint_is_storage(config, whole, tmp_path, capsys):
    """The checkpoint is saved anew with one bit of one parameter changed: its files are in order."""
    shutil.copytree(whole, tmp_path / "run")
    folder, mesh = tmp_path / "run" / "checkpoints", make_mesh(config.mesh, jax.devices()[ONE])
    state, meta = restore_state(folder, 4, abstract_state(config, mesh)), read_meta(folder, 4)
    gain = state.params.final_norm.gain
    words = np.asarray(gain[...]).view(np.uint32).copy()
    words[5] ^= 1
    gain[...] = jax.device_put(words.view(np.float32), gain[...].sharding)
    shutil.rmtree(folder / "4")
    with Checkpointer(folder, keep_last=9) as checkpointer:
        checkpointer.save(4, state, meta)
    code, result = replayed(tmp_path / "run", 5, capsys)
    assert (code, result["cause"], result["at_step"]) == (3, "storage", 4), result
    assert "the checkpoint's params has digest" in result["detail"]
    assert replayed(tmp_path / "run", 4, capsys)[1]["agrees"]


def test_a_checkpoint_that_cannot_be_read_is_storage(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    code, result = replayed(tmp_path / "run", 5, capsys)
    assert (code, result["cause"], result["at_step"]) == (3, "storage", 4), result


@pytest.fixture
def swapped(config, tmp_path):
    """(config, place, file): a config with its own data, the place of a row of step 5, and a shard of the same size as
    the place's, to swap it with."""
    shutil.copytree(config.data.path, tmp_path / "data")
    mine = apply_overrides(config, [f"data.path={tmp_path / 'data'}"])
    data = open_data(mine)
    places = RowPlaces(data.datasets, global_batch_size=mine.train.global_batch_size, seed=mine.train.seed).of_batch(4)
    shards = data.datasets[0].manifest.train.shards
    for place in places:
        twins = [s for s in shards if (s.size, s.rows) == (place.shard.size, place.shard.rows) and s != place.shard]
        if twins:
            return mine, place, tmp_path / "data" / twins[0].file
    raise AssertionError("no two shards of one size")


def swap(place, other):
    mine = pathlib.Path(place.path)
    first, second = mine.read_bytes(), other.read_bytes()
    mine.write_bytes(second)
    other.write_bytes(first)


def test_a_shard_swapped_after_the_run_is_data(swapped, tmp_path, capsys):
    mine, place, other = swapped
    train(mine, tmp_path / "run", devices=jax.devices()[ONE])
    assert replayed(tmp_path / "run", 5, capsys)[0] == 0
    swap(place, other)
    code, result = replayed(tmp_path / "run", 5, capsys)
    assert (code, result["cause"], result["at_step"]) == (3, "data", 5), result
    assert place.path in result["detail"] and f"(record {place.record})" in result["detail"]


def test_a_shard_swapped_before_the_run_is_data(swapped, tmp_path, capsys):
    """The run was fed the swapped shard, so its ledger agrees with it; the manifest does not."""
    mine, place, other = swapped
    swap(place, other)
    train(mine, tmp_path / "run", devices=jax.devices()[ONE])
    code, result = replayed(tmp_path / "run", 5, capsys)
    assert (code, result["cause"], result["at_step"]) == (3, "data", 5), result
    assert place.path in result["detail"]


def test_a_shard_cut_short_is_data(swapped, tmp_path, capsys):
    mine, place, _ = swapped
    train(mine, tmp_path / "run", devices=jax.devices()[ONE])
    with open(place.path, "r+b") as file:
        file.truncate(100)
    code, result = replayed(tmp_path / "run", 5, capsys)
    assert (code, result["cause"]) == (3, "data") and "its manifest says" in result["detail"], result
