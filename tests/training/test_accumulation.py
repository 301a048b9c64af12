"""Microbatches that hold unequal numbers of tokens make the same step as one big batch."""

import functools

import jax
import numpy as np
import optax

from maxlm.model import make_transformer
from maxlm.training.state import TrainState
from maxlm.training.step import train_step
from tests.training.tiny import ROWS, furthest, host_batch, leaves, tiny_config


def unequal_batch():
    """Even rows lose all but one target, so that the halves that alternate rows weigh 1 to 15."""
    batch = host_batch(0)
    batch["targets"][::2, 1:] = -1
    batch["targets"][3] = batch["tokens"][3]
    return batch


def step(batch, microbatches):
    """(loss, gradient), the latter read off a step of plain gradient descent at rate 1."""
    config = tiny_config(model=dict(num_layers=1, layer_pattern=["global"], qk_norm=False)).model
    params = make_transformer(config, jax.random.key(0))
    optimizer = optax.sgd(lambda count: 1.0)
    state = TrainState(jax.numpy.int32(0), params, optimizer.init(params))
    run = jax.jit(functools.partial(
        train_step, optimizer=optimizer, schedule=lambda step: 1.0, microbatches=microbatches, z_loss=1e-3, chunks=1))
    after, metrics = run(state, batch)
    gradient = [a - b for a, b in zip(leaves(params), leaves(after.params), strict=True)]
    return float(metrics.loss), gradient, int(metrics.tokens)


def test_unequal_microbatches_equal_one_batch_and_a_mean_of_means_does_not():
    batch = unequal_batch()
    loss, gradient, tokens = step(batch, 1)
    assert tokens == (batch["targets"] >= 0).sum()
    split_loss, split_gradient, split_tokens = step(batch, 2)
    assert (abs(split_loss - loss) < 1e-6, furthest(split_gradient, gradient) < 1e-6) == (True, True)
    assert split_tokens == tokens
    halves = [step({name: a[half::2] for name, a in batch.items()}, 1) for half in (0, 1)]
    assert halves[0][2] * 10 < halves[1][2]
    naive = [(a + b) / 2 for a, b in zip(halves[0][1], halves[1][1], strict=True)]
    assert furthest(naive, gradient) > 1e-3
    assert abs(np.mean([halves[0][0], halves[1][0]]) - loss) > 1e-3


def test_a_batch_without_targets_is_a_step_of_nothing():
    batch = host_batch(0)
    batch["targets"] = np.full_like(batch["targets"], -1)
    loss, gradient, tokens = step(batch, 2)
    assert (loss, tokens) == (0.0, 0) and all((g == 0).all() for g in gradient)
    assert len(batch["targets"]) == ROWS
