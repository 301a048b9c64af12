"""Muon: the layers' matrices are orthogonalised one by one, everything else is AdamW's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import OptimizerConfig, ScheduleConfig
from maxlm.model import make_transformer
from maxlm.training.optimizer import make_optimizer
from tests.training.tiny import run_steps, tiny_config

RATE = 0.01


def first_update():
    """One step from zero moments with random gradients, no clipping, no decay, at a constant rate."""
    config = OptimizerConfig(name="muon", learning_rate=RATE, weight_decay=0.0, clip_norm=0.0)
    optimizer = make_optimizer(config, ScheduleConfig(name="constant", warmup_steps=0), 10)
    params = jax.jit(lambda: make_transformer(tiny_config().model, jax.random.key(0)))()
    grads = jax.tree.map(lambda a: jnp.asarray(np.random.default_rng(a.size).normal(size=a.shape), a.dtype), params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    return grads, updates


def matrices(block):
    """The (contracted, produced) matrices of layer 0: queries by their place in a head group, keys, values, ..."""
    qkv_DGRK, out_HKD = np.asarray(block.attention.qkv[...][0]), np.asarray(block.attention.out[...][0])
    width = qkv_DGRK.shape[0]
    parts = {f"qkv {r}": qkv_DGRK[:, :, r].reshape(width, -1) for r in range(qkv_DGRK.shape[2])}
    mlp = {name: np.asarray(getattr(block.mlp, name)[...][0]) for name in ("gate", "up", "down")}
    return {**parts, "out": out_HKD.reshape(-1, width), **mlp}


def test_each_matrix_moves_along_the_orthogonal_factor_of_its_gradient():
    grads, updates = first_update()
    moved = matrices(updates.layers_0)
    for name, gradient in matrices(grads.layers_0).items():
        left, _, right = np.linalg.svd(gradient, full_matrices=False)
        scaled = moved[name] / (-RATE * 0.2 * np.sqrt(max(gradient.shape)))
        along = np.diag(left.T @ scaled @ right.T)
        # Five Newton-Schulz steps bring singular values near 1, not to it (Jordan et al. 2024).
        assert np.all((along > 0.6) & (along < 1.3)), (name, along)
        assert np.abs(left.T @ scaled @ right.T - np.diag(along)).max() < 1e-3, name


def test_heads_of_another_part_are_another_matrix():
    """The twin: taken as one matrix, query, key and value parts are not orthogonal together."""
    grads, updates = first_update()
    qkv = np.asarray(updates.layers_0.attention.qkv[...][0]).reshape(32, -1)
    gradient = np.asarray(grads.layers_0.attention.qkv[...][0]).reshape(32, -1)
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    mixed = left.T @ qkv @ right.T
    assert np.abs(mixed - np.diag(np.diag(mixed))).max() > 1e-2 * np.abs(mixed).max()


def test_tables_and_gains_move_as_adamw_moves_them():
    grads, updates = first_update()
    for gradient, moved in ((grads.embedding, updates.embedding), (grads.final_norm.gain, updates.final_norm.gain)):
        expected = -RATE * np.sign(np.asarray(gradient[...]))  # Adam's first step is the sign
        assert np.allclose(np.asarray(moved[...]), expected, atol=1e-5)


@pytest.mark.slow
def test_a_mesh_trains_like_one_device():
    muon = dict(optimizer=dict(name="muon", learning_rate=5e-3))
    alone = run_steps(tiny_config(**muon), devices=1, steps=10)
    spread = run_steps(tiny_config(mesh=dict(data=2, fsdp=2, tensor=2), **muon), devices=8, steps=10)
    slower = dict(optimizer=dict(name="muon", learning_rate=5e-3, muon_momentum=0.9))
    other = run_steps(tiny_config(**slower), devices=1, steps=10)
    apart = lambda a, b: max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))  # noqa: E731
    rounding = 3e-5
    assert apart(alone, spread) < rounding
    assert apart(alone, other) > 4 * rounding
