"""However a step is spread over devices or unrolled, it trains the same model."""

import functools

import jax
import pytest

from maxlm.parallel.mesh import make_mesh
from maxlm.training.state import init_state
from tests.training.tiny import furthest, leaves, run_steps, tiny_config

# float32, 20 steps at learning rate 1e-2, parameters and moments; a wrong gradient is off by 1e-2 and more
ROUNDING = 1e-4


@functools.cache
def single_device():
    return run_steps(tiny_config(), devices=1)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow, id=str(values[0]))


def check_like_single_device(config, devices):
    expected = single_device()
    run = run_steps(config, devices, start=expected.first)
    assert max(abs(a - b) for a, b in zip(run.losses, expected.losses, strict=True)) < ROUNDING
    assert furthest(run.last, expected.last) < ROUNDING


MESHES = {"fsdp": dict(fsdp=2), "data": dict(data=2), "tensor": dict(tensor=2), "all": dict(data=2, fsdp=2, tensor=2)}


@pytest.mark.parametrize(("mesh", "devices", "how"), [
    pytest.param("fsdp", 2, {}, id="fsdp"),
    pytest.param("data", 2, {}, id="data"),
    pytest.param("tensor", 2, {}, id="tensor"),
    pytest.param("all", 8, dict(train=dict(grad_accumulation=2), remat=dict(policy="names"),
                                compute=dict(loss_chunks=4)), id="all, microbatches, remat of names, loss chunks"),
])
def test_a_mesh_trains_like_one_device(mesh, devices, how):
    check_like_single_device(tiny_config(mesh=MESHES[mesh], **how), devices)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(fsdp=8), dict(data=8, fsdp=1), dict(data=4, fsdp=2), dict(fsdp=4, tensor=2)],
                         ids=str)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_larger_meshes_train_like_one_device(mesh, microbatches):
    check_like_single_device(tiny_config(mesh=mesh, train=dict(grad_accumulation=microbatches)), 8)


@pytest.mark.parametrize("mesh", [MESHES["all"], *(pytest.param(m, marks=pytest.mark.slow) for m in (
    dict(fsdp=8), dict(data=4, fsdp=2)))], ids=str)
def test_init_has_the_same_bits_on_a_mesh(mesh):
    config = tiny_config(mesh=mesh)
    made = make_mesh(config.mesh)
    with jax.set_mesh(made):
        state = init_state(config, made)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    assert all((a == b).all() for a, b in zip(leaves(state), single_device().first, strict=True))


@pytest.mark.parametrize("how", [
    pytest.param(dict(remat=dict(policy="dots"), compute=dict(layer_unroll="all")), id="unrolled, remat of dots"),
    pytest.param(dict(remat=dict(policy="full"), compute=dict(layer_unroll=2)), id="partly unrolled, full remat"),
    slow(dict(train=dict(grad_accumulation=4), compute=dict(loss_chunks=16))),
    slow(dict(compute=dict(layer_unroll="all"))),
    slow(dict(compute=dict(layer_unroll=2))),
    slow(dict(remat=dict(policy="full"))),
    slow(dict(remat=dict(policy="dots"))),
    slow(dict(remat=dict(policy="names"))),
    slow(dict(compute=dict(loss_chunks=2))),
    slow(dict(train=dict(grad_accumulation=16))),
])
def test_how_it_is_computed_does_not_change_what_is_trained(how):
    check_like_single_device(tiny_config(**how), devices=1)


@pytest.mark.parametrize("change", [
    dict(model=dict(sliding_window=8)),
    slow(dict(train=dict(z_loss=0.0))),
    slow(dict(optimizer=dict(weight_decay=0.0))),
    slow(dict(model=dict(logit_softcap=21.0))),
    slow(dict(schedule=dict(warmup_steps=3))),
], ids=str)
def test_the_comparison_sees_a_change(change):
    """The twin of the tests above: what trains something else lands further away than rounding."""
    run = run_steps(tiny_config(**change), devices=1, start=single_device().first)
    assert furthest(run.last, single_device().last) > 3 * ROUNDING


def test_the_step_reports_what_it_did():
    metrics = single_device().metrics
    assert int(metrics.tokens) == 15 * 15  # one row of 16 has no targets, and each row lacks one at the boundary
    assert 0 < float(metrics.grad_norm) < 10
    assert 0 < float(metrics.learning_rate) < 1e-2
