"""A model with experts trains on any mesh, by any exchange, like the dense-loop reference on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.model.moe.layer import MoE
from maxlm.parallel.mesh import make_mesh
from maxlm.training import state as state_module
from maxlm.training.state import abstract_state, init_state
from maxlm.training.step import compile_step
from tests.training.moe_reference import dense_moe
from tests.training.tiny import furthest, host_batch, leaves, on, placed, tiny_config

ROUNDING = 2e-5  # of parameters and moments after 20 steps; float32, weights up to 1
SIZES = {"num_layers": 2, "layer_pattern": ["global"], "num_experts": 8, "experts_per_token": 2, "expert_dim": 16}
ROUTERS = {
    "softmax": dict(balance_loss=0.02, router_z_loss=1e-3, normalize_weights=False),
    "deepseek": dict(scores="sigmoid", bias_rate=1e-2, num_groups=4, groups_per_token=2, weight_scale=2.5,
                     shared_experts=1, dense_layers=1, balance_loss=1e-3, balance_over="sequence"),
    "gpt-oss": dict(expert_bias=True, jitter=0.2, balance_loss=0.01),
}


def settings(router, how=None, **sections):
    model = SIZES | {"moe": ROUTERS[router] | (how or {})}
    return tiny_config(**{"model": model, "train": {"z_loss": 0.0}, **sections})


def trained(config, devices, start=None):
    """(leaves before, after 1 step, after 20; losses; the last metrics). Adam's first moment after a step is a tenth of
    the gradient, so that comparing the states compares all gradients."""
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        state = init_state(config, mesh) if start is None else placed(start, abstract_state(config, mesh))
        kept, step, losses = [leaves(state)], compile_step(config, mesh), []
        for index in range(20):
            state, metrics = step(state, on(mesh, host_batch(index)))
            losses.append(float(metrics.loss))
            if index in (0, 19):
                kept.append(leaves(state))
    return kept, losses, jax.device_get(metrics)


@functools.cache
def reference(router, **how):
    """The dense loop's run from weights of the size of trained ones (so that tokens differ in their experts)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoE, "__call__", dense_moe)
        config = settings(router, how)
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(mesh):
            start = leaves(init_state(config, mesh))
        return trained(config, 1, [10 * a if a.ndim > 2 and a.dtype == np.float32 else a for a in start])


def compare(router, devices, start=None, **sections):
    """How far (first gradients and moments, state after 20 steps, losses) are from the reference's."""
    (first, *kept), losses, metrics = reference(router)
    got, got_losses, got_metrics = trained(settings(router, **sections), devices, start or first)
    assert got_metrics.load.dropped.sum() == 0
    away = max(furthest(a, b) for a, b in zip(got[1:], kept, strict=True))
    counts = np.abs(got_metrics.load.chosen_E - metrics.load.chosen_E).max()
    return max(away, float(np.abs(np.subtract(got_losses, losses)).max()), float(counts))


def emulated(rows, empty, start, length, to, received, *, axis_name):
    """What `lax.ragged_all_to_all` is documented to do, with an all_gather: CPUs do not have it."""
    me = jax.lax.axis_index(axis_name)
    every = [jax.lax.all_gather(a, axis_name) for a in (rows, start, length, to)]
    place = jnp.arange(empty.shape[0])
    for sender in range(jax.lax.axis_size(axis_name)):
        rows, start, length, to = (a[sender] for a in every)
        inside = (place >= to[me]) & (place < to[me] + length[me])
        source = jnp.where(inside, place - to[me] + start[me], 0)
        empty = jnp.where(inside.reshape(-1, *(1,) * (empty.ndim - 1)), rows[source], empty)
    return empty


@pytest.fixture
def ragged(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    chosen = state_module.kernels_of
    monkeypatch.setattr(state_module, "kernels_of", lambda config, device: (
        chosen(config, device)[0]._replace(exchange="ragged_all_to_all"), ""))


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(("router", "mesh", "devices", "compute"), [
    ("deepseek", dict(expert=4, tensor=2), 8, {}),
    slow("softmax", dict(expert=8), 8, {}),
    slow("softmax", dict(expert=2, data=2, fsdp=2), 8, dict(expert_exchange="all_gather")),
    slow("softmax", dict(fsdp=4, tensor=2), 8, {}),
    slow("deepseek", dict(expert=2, fsdp=2, tensor=2), 8, dict(layer_unroll="all")),
    slow("gpt-oss", dict(expert=4, data=2), 8, {}),
    slow("gpt-oss", dict(expert=4, tensor=2), 8, dict(expert_exchange="all_gather")),
    slow("gpt-oss", {}, 1, dict(grouped_matmul="ragged_dot")),
])
def test_a_mesh_trains_like_the_dense_loop_on_one_device(router, mesh, devices, compute):
    assert compare(router, devices, mesh=mesh, compute=compute) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(("router", "mesh"), [
    ("softmax", dict(expert=4, fsdp=2)), ("deepseek", dict(expert=2, data=2, tensor=2))])
def test_the_ragged_exchange_trains_like_the_dense_loop(router, mesh, ragged):
    assert compare(router, 8, mesh=mesh) < ROUNDING


@pytest.mark.slow
def test_microbatches_add_up_to_the_batch():
    """The reference sees the batch whole; balance over each sequence is the same either way."""
    assert compare("deepseek", 4, mesh=dict(expert=2, data=2),
                   train=dict(grad_accumulation=2, z_loss=0.0)) < ROUNDING


@pytest.mark.parametrize(("router", "change"), [
    ("deepseek", dict(weight_scale=2.4)),
    slow("softmax", dict(normalize_weights=True)),
    slow("softmax", dict(router_z_loss=1.1e-3)),
    slow("deepseek", dict(groups_per_token=3)),
    slow("deepseek", dict(bias_rate=0.9e-2)),
    slow("deepseek", dict(balance_over="batch")),
    slow("gpt-oss", dict(jitter=0.19)),
], ids=str)
def test_the_comparison_sees_a_change(router, change):
    """The twins of the tests above."""
    assert compare(router, 1, how=change) > 5 * ROUNDING
