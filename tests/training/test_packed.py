"""Packed runs are the runs that each config makes alone; and what cannot be packed is refused."""

import dataclasses

import numpy as np
import pytest

from maxlm.schema import ConfigError
from maxlm.training.packed import PackedRuns, check_packable, run_of, stacked
from tests.training.tiny import host_batch, leaves, run_steps, tiny_config

STEPS = 6
SEEDS, RATES = (0, 3), (1e-2, 3e-3)


def config_of(seed, rate):
    return tiny_config(model=dict(num_layers=2), train=dict(seed=seed, num_steps=STEPS), mesh=dict(fsdp=1),
                       optimizer=dict(learning_rate=rate), schedule=dict(warmup_steps=2))


@pytest.fixture(scope="module")
def packed():
    runs = PackedRuns([config_of(*run) for run in zip(SEEDS, RATES, strict=True)])
    states, losses = runs.init(), []
    first = [leaves(run_of(states, number)) for number in range(2)]
    for index in range(STEPS):
        states, metrics = runs.step(states, stacked([host_batch(index + seed) for seed in SEEDS]))
        losses.append(np.asarray(metrics.loss))
    return first, np.array(losses), states, metrics, runs


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_each_loss_is_that_of_the_run_alone(packed, number, monkeypatch):
    first, losses, states, metrics, _ = packed
    monkeypatch.setattr("tests.training.tiny.host_batch", lambda index: host_batch(index + SEEDS[number]))
    alone = run_steps(config_of(SEEDS[number], RATES[number]), devices=1, steps=STEPS)
    for packed_leaf, leaf in zip(first[number], alone.first, strict=True):
        assert np.array_equal(packed_leaf, leaf), "the initial values are the same bits"
    assert np.allclose(losses[:, number], alone.losses, rtol=2e-5)
    assert np.isclose(metrics.learning_rate[number], alone.metrics.learning_rate, rtol=1e-6)
    for packed_leaf, leaf in zip(leaves(run_of(states, number)), alone.last, strict=True):
        assert np.allclose(packed_leaf, leaf, atol=2e-4)
    assert not np.allclose(losses[:, 1 - number], alone.losses, rtol=2e-5), "and the other run's are not"


def test_held_out_losses_of_all_runs(packed):
    *_, states, _, runs = packed
    batch = host_batch(99)
    nats, tokens = runs.losses(states, stacked([batch, batch]))
    assert nats.shape == tokens.shape == (2,) and tokens[0] == (batch["targets"] >= 0).sum() and nats[0] != nats[1]


def test_what_cannot_be_packed():
    base = config_of(0, 1e-2)
    check_packable([base, config_of(1, 2e-2)])
    wider = dataclasses.replace(base, model=dataclasses.replace(base.model, mlp_dim=128))
    for configs, words in (
        ([base, wider], "model.mlp_dim: 64 and 128"),
        ([], "no run to pack"),
        ([dataclasses.replace(base, mesh=dataclasses.replace(base.mesh, data=2))], "use one device"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_packable(configs)
