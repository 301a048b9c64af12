"""Silent corruption is found and its device named; sound devices agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from maxlm.checkpoint import latest_step
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import BATCH
from maxlm.resilience import RunStopped
from maxlm.training import corruption, loop
from maxlm.training import step as step_module
from maxlm.training.corruption import CorruptionCheck
from maxlm.training.digest import row_digests
from maxlm.training.state import init_state
from tests.training.runs import prepared, train, write_config
from tests.training.tiny import host_batch, on, tiny_config


def with_a_bad_copy(array, device):
    """`array`, of which the copy on `device` (a place in the list of its shards) has one bit flipped."""
    pieces = [np.array(shard.data) for shard in array.addressable_shards]
    pieces[device].reshape(-1).view(np.uint32)[0] ^= 1
    placed = [jax.device_put(p, s.device) for p, s in zip(pieces, array.addressable_shards, strict=True)]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, placed)


ONE_LAYER = {"num_layers": 1, "layer_pattern": ["global"]}


def checked(axes, devices, harm=lambda state: None, model=ONE_LAYER, **sections):
    """Makes a state, harms it, and checks it."""
    config = tiny_config(mesh=axes, model=model, **sections)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
        harm(state)
        CorruptionCheck(config, mesh).check(7, state, on(mesh, host_batch(0)))


def flip(device):
    def harm(state):
        gain = state.params.final_norm.gain
        gain[...] = with_a_bad_copy(gain[...], device)
    return harm


def computing_wrongly(group, monkeypatch):
    """Devices of `group` along the batch axes give other digests than they should."""
    def faulty(x):
        wrong = jax.shard_map(lambda d: d + (jax.lax.axis_index(BATCH) == group).astype(jnp.uint32),
                              in_specs=P(BATCH, None), out_specs=P(BATCH, None))
        return wrong(row_digests(x))

    monkeypatch.setattr(corruption, "row_digests", faulty)


@pytest.mark.parametrize(("axes", "devices"), [({"data": 2, "context": 2, "tensor": 2}, 8), ({}, 1)])
def test_sound_devices_agree(axes, devices):
    checked(axes, devices, train={"grad_accumulation": 2})


SPARSE = ONE_LAYER | {"num_experts": 4, "experts_per_token": 2, "expert_dim": 16}


@pytest.mark.parametrize("moe", [{"balance_loss": 0.1}, {"capacity_factor": 0.8}], ids=["dropless", "dropping"])
def test_sound_experts_agree(moe):
    """Rows are compared between whole groups of experts: who else is there decides what has no room."""
    checked({"data": 2, "expert": 2, "fsdp": 2}, 8, model=SPARSE | {"moe": moe})


def test_experts_that_compute_wrongly_are_named(monkeypatch):
    computing_wrongly(5, monkeypatch)  # of groups of 2 devices; the third is data=1, fsdp=0
    with pytest.raises(RunStopped, match=r"another device: data=1, fsdp=0 \(device 4 of process 0, device 5 of"):
        checked({"data": 2, "expert": 2, "fsdp": 2}, 8, model=SPARSE)


def test_a_bad_copy_is_named():
    with pytest.raises(RunStopped, match=r"silent corruption at step 7: .*: replica 2 \(device 2 of process 0\)\."):
        checked({"data": 4, "fsdp": 1}, 4, flip(2))


def test_of_two_copies_both_are_suspect():
    with pytest.raises(RunStopped, match=r"replica 0 \(device 1 .*, 1 \(device 3 of process 0\)"):
        checked({"data": 2, "fsdp": 2}, 4, flip(3))


def test_a_device_that_computes_wrongly_is_named(monkeypatch):
    group = 3  # its neighbour is group 0
    computing_wrongly(group, monkeypatch)
    place = f"data={group // 2}, fsdp={group % 2}"
    with pytest.raises(RunStopped, match=rf"other bits on another device: {place} \(device {group} of process 0\)\."):
        checked({"data": 2, "fsdp": 2}, 4)


@pytest.mark.slow
def test_a_run_stops_with_exit_code_3_and_saves_nothing_corrupt(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path / "tiny.py", prepared(tmp_path / "data"))
    settings = ("mesh.data=4", "mesh.fsdp=2", "resilience.corruption_check_every_steps=2", "eval.every_steps=0",
                "eval.num_batches=1", "train.num_steps=4")
    assert train(config, tmp_path / "sound", *settings) == 0
    capsys.readouterr()

    def compiled(*arguments):
        real = step_module.compile_step(*arguments)

        def call(state, batch):
            if int(state.step) == 3:
                flip(5)(state)
            return real(state, batch)

        call.as_text = real.as_text
        return call

    monkeypatch.setattr(loop, "compile_step", compiled)
    assert train(config, tmp_path / "run", *settings) == 3
    assert "silent corruption at step 4" in capsys.readouterr().err.splitlines()[-1]
    assert latest_step(tmp_path / "run" / "checkpoints") == 2


def test_a_check_needs_a_period_of_0_or_more():
    config = tiny_config()
    with pytest.raises(ValueError, match="corruption_check_every_steps=-1"):
        dataclasses.replace(config.resilience, corruption_check_every_steps=-1)
