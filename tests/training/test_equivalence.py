"""However a step is spread over devices or unrolled, it trains the same model."""

import functools

import pytest

from tests.training.tiny import furthest, run_steps, tiny_config

ROUNDING = 3e-5  # float32, 20 steps at learning rate 1e-2; a wrong gradient is off by 1e-2 and more


@functools.cache
def single_device():
    return run_steps(tiny_config(), devices=1)


WAYS = {
    "fsdp 8": dict(mesh=dict(fsdp=8)),
    "data 8": dict(mesh=dict(data=8, fsdp=1)),
    "data 2, fsdp 2, tensor 2": dict(mesh=dict(data=2, fsdp=2, tensor=2)),
    "fsdp 4, tensor 2, two microbatches": dict(mesh=dict(tensor=2), train=dict(grad_accumulation=2)),
    "fsdp 2, data 4, remat of names, loss in 4 chunks": dict(
        mesh=dict(data=4), remat=dict(policy="names"), compute=dict(loss_chunks=4)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_mesh_trains_like_one_device(way):
    first, losses, last, _ = run_steps(tiny_config(**WAYS[way]), devices=8)
    expected_first, expected_losses, expected_last, _ = single_device()
    assert all((a == b).all() for a, b in zip(first, expected_first, strict=True)), "init differs between meshes"
    assert max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)) < ROUNDING
    assert furthest(last, expected_last) < ROUNDING


ONE_DEVICE_WAYS = {
    "unrolled": dict(compute=dict(layer_unroll="all")),
    "partly unrolled": dict(compute=dict(layer_unroll=2)),
    "full remat": dict(remat=dict(policy="full")),
    "unrolled, remat of dots": dict(remat=dict(policy="dots"), compute=dict(layer_unroll="all")),
    "four microbatches": dict(train=dict(grad_accumulation=4)),
    "loss in 16 chunks": dict(compute=dict(loss_chunks=16)),
}


@pytest.mark.parametrize("way", ONE_DEVICE_WAYS)
def test_how_it_is_computed_does_not_change_what_is_trained(way):
    _, losses, last, _ = run_steps(tiny_config(**ONE_DEVICE_WAYS[way]), devices=1, steps=20)
    _, expected_losses, expected_last, _ = single_device()
    assert max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)) < ROUNDING
    assert furthest(last, expected_last) < ROUNDING


PERTURBED = {
    "another seed": dict(train=dict(seed=1)),
    "no z-loss": dict(train=dict(z_loss=0.0)),
    "a window one token wider": dict(model=dict(sliding_window=8)),
    "no weight decay": dict(optimizer=dict(weight_decay=0.0)),
}


@pytest.mark.parametrize("change", PERTURBED)
def test_the_comparison_sees_a_change(change):
    """The twin of the two tests above: what trains something else lands further away than rounding."""
    _, _, last, _ = run_steps(tiny_config(**PERTURBED[change]), devices=1)
    assert furthest(last, single_device()[2]) > 3 * ROUNDING


def test_the_step_reports_what_it_did():
    metrics = single_device()[3]
    assert int(metrics.tokens) == 15 * 15  # one row of 16 has no targets, and each row lacks one at the boundary
    assert 0 < float(metrics.grad_norm) < 10
    assert 0 < float(metrics.update_norm) < 1
    assert 0 < float(metrics.learning_rate) < 1e-2
