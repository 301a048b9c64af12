"""mup and completep: the same model at the base size, the table's factors away from it, and rates that transfer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.coordinate_check import coordinates, losses
from maxlm.config import ModelConfig, OptimizerConfig, ParametrizationConfig, RunConfig, ScheduleConfig
from maxlm.model import make_transformer
from maxlm.model.parametrization import Multipliers, multipliers
from maxlm.schema import ConfigError
from maxlm.training.optimizer import make_optimizer

BASE = ModelConfig(num_layers=2, hidden_dim=32, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64, vocab_size=64)
NAMES = ("standard", "mup", "completep")


def model_config(name, width=32, depth=2):
    times, chosen = width // 32, ParametrizationConfig(name, base_width=32, base_depth=2)
    return dataclasses.replace(BASE, hidden_dim=width, num_heads=4 * times, num_kv_heads=4 * times, mlp_dim=64 * times,
                               num_layers=depth, parametrization=chosen)


def test_all_agree_at_the_base():
    plain = Multipliers(residual_init=math.sqrt(4))
    assert [multipliers(model_config(name)) for name in NAMES] == [plain] * 3


def test_the_table_away_from_the_base():
    wide = multipliers(model_config("mup", 128, 4))
    assert wide == Multipliers(2.0, 2 * math.sqrt(8), 1.0, 0.25, 0.25, 0.25, 0.25)
    deep = multipliers(model_config("completep", 128, 4))
    assert deep == Multipliers(2.0, 2 * math.sqrt(4), 0.5, 0.25, 0.25, 0.125, 0.25)
    assert multipliers(model_config("standard", 128, 4)) == Multipliers(residual_init=math.sqrt(8))


def test_initial_values_and_multipliers_are_in_the_model():
    """At four times the width and twice the depth, against the standard model of that size from the same key."""
    key = jax.random.key(0)
    plain, scaled = (make_transformer(model_config(name, 128, 4), key) for name in ("standard", "completep"))
    close = lambda a, b: np.testing.assert_allclose(a[...], b[...], rtol=1e-6)  # noqa: E731
    close(2 * scaled.layers_0.mlp.up[...], plain.layers_0.mlp.up)
    close(2 / math.sqrt(2) * scaled.layers_0.mlp.down[...], plain.layers_0.mlp.down)
    close(2 / math.sqrt(2) * scaled.layers_0.attention.out[...], plain.layers_0.attention.out)
    close(scaled.embedding, plain.embedding)
    x = jax.random.normal(jax.random.key(1), (1, 4, 128))
    assert scaled.layers_0.multiplier == 0.5 and plain.layers_0.multiplier == 1.0
    np.testing.assert_allclose(scaled._finished(x), plain._finished(x) / 4, rtol=1e-6)


def test_rates_eps_and_decay_of_each_kind_of_parameter():
    config = OptimizerConfig(learning_rate=0.1, b1=0.0, b2=0.0, eps=1e-2, weight_decay=0.5, clip_norm=0.0)
    schedule = ScheduleConfig(name="constant", warmup_steps=0)
    params = make_transformer(model_config("completep", 128, 4), jax.random.key(0))
    scale = multipliers(params.config)
    optimizer = make_optimizer(config, schedule, 10, scale=scale)
    grads = jax.tree.map(lambda a: jnp.full_like(a, 1e-2), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)

    def expect(update, weight, eps, rate, decay):
        wanted = -0.1 * (rate * 1e-2 / (1e-2 + eps * 1e-2) + decay * weight[...])
        np.testing.assert_allclose(update[...], wanted, rtol=1e-5, atol=1e-7)

    expect(updates.layers_0.mlp.up, params.layers_0.mlp.up, eps=1 / 8, rate=1 / 4, decay=0.5)
    expect(updates.layers_0.attention.qkv, params.layers_0.attention.qkv, eps=1 / 8, rate=1 / 4, decay=0.5)
    expect(updates.layers_0.mlp_norm.gain, params.layers_0.mlp_norm.gain, eps=1 / 8, rate=1, decay=0)
    expect(updates.embedding, params.embedding, eps=1 / 4, rate=1, decay=0.5)
    expect(updates.final_norm.gain, params.final_norm.gain, eps=1 / 4, rate=1, decay=0)


def test_what_has_no_rule_is_refused():
    with pytest.raises(ConfigError, match="is for optimizer.name='adamw'"):
        RunConfig(model=model_config("mup"), optimizer=OptimizerConfig(name="muon"))
    with pytest.raises(ConfigError, match="has no rule for routers"):
        dataclasses.replace(model_config("mup"), num_experts=4, experts_per_token=1, expert_dim=16)


@pytest.mark.slow
def test_updates_of_the_logits_do_not_grow_with_the_width():
    change = {(name, width): coordinates(name, width, 2)["logits_change"]
              for name in ("standard", "mup") for width in (32, 128)}
    assert change["mup", 32] == pytest.approx(change["standard", 32], rel=1e-3)
    assert 0.5 < change["mup", 128] / change["mup", 32] < 1.5
    assert change["standard", 128] / change["standard", 32] > 2


@pytest.mark.slow
def test_the_best_learning_rate_is_that_of_the_small_model():
    """The regret of taking the small model's best rate at four times its width."""
    rates = tuple(2.0**-k for k in range(8, 3, -1))
    small = losses("mup", 32, 2, 60, rates)
    best = int(np.argmin(small))
    regret = {}
    for name in ("standard", "mup"):
        large = losses(name, 128, 2, 60, rates)
        regret[name] = large[best] - min(large)
    assert regret["mup"] < 0.03 < 2 * regret["mup"] + 0.03 < regret["standard"]
