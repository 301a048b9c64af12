"""Rotary positions: relative, and each scaling against its paper's formula written out one frequency at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import RopeConfig
from maxlm.model.rope import frequencies, rotate, rotation
from tests.model.tiny_model import furthest, hidden, tiny_model, tokens_of

HEAD = 64


def scores(config, first_query, first_key):
    """q . k of random vectors rotated at positions that start at two offsets, [H, T, S]."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 2, HEAD))
    turn = lambda first: rotation(config, HEAD, first + jnp.arange(6)[None])  # noqa: E731
    return jnp.einsum("BTHK,BSHK->HTS", rotate(q, turn(first_query)), rotate(k, turn(first_key)))


@pytest.mark.parametrize("scaling", ["none", "linear", "llama3", "yarn"])
def test_only_the_distance_counts(scaling):
    config = RopeConfig(scaling=scaling, factor=4.0, original_max_len=64)
    assert furthest(scores(config, 100, 90), scores(config, 10, 0)) < 2e-3
    assert furthest(scores(config, 101, 90), scores(config, 10, 0)) > 0.1


def test_a_model_does_not_see_absolute_positions():
    model, tokens = tiny_model(), tokens_of(1, 12)
    assert furthest(hidden(model, tokens, offset=50), hidden(model, tokens)) < 1e-4


def test_a_position_turns_pairs_of_dims():
    """Dim i with dim i + K/2, by position * theta^(-2i/K) (arXiv:2104.09864, section 3.2.2), as complex numbers."""
    x = np.random.default_rng(0).normal(size=(1, 3, 1, HEAD)).astype(np.float32)
    positions = np.array([0, 1, 7])
    angle = positions[:, None] * 10_000.0 ** (-2 * np.arange(HEAD // 2) / HEAD)
    turned = (x[0, :, 0, : HEAD // 2] + 1j * x[0, :, 0, HEAD // 2 :]) * np.exp(1j * angle)
    got = rotate(jnp.asarray(x), rotation(RopeConfig(), HEAD, jnp.asarray(positions)[None]))[0, :, 0]
    assert furthest(got, np.concatenate([turned.real, turned.imag], axis=-1)) < 1e-5


def linear(base, config):
    return base / config.factor


def llama3(base, config):
    """Llama 3.1's released model code: long wavelengths are divided, short ones kept, a ramp in between."""
    wavelength = 2 * math.pi / base
    if wavelength < config.original_max_len / config.high_freq_factor:
        return base
    if wavelength > config.original_max_len / config.low_freq_factor:
        return base / config.factor
    smooth = (config.original_max_len / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor)
    return (1 - smooth) * base / config.factor + smooth * base


FORMULAS = {"linear": linear, "llama3": llama3}


@pytest.mark.parametrize("scaling", FORMULAS)
def test_scaling_follows_its_formula(scaling):
    config = RopeConfig(theta=500_000.0, scaling=scaling, factor=8.0, original_max_len=8192)
    bases = [config.theta ** (-2 * i / HEAD) for i in range(HEAD // 2)]
    radians, temperature = frequencies(config, HEAD)
    assert np.allclose(radians, [FORMULAS[scaling](base, config) for base in bases], rtol=1e-12)
    assert temperature == 1.0
    assert not np.allclose(radians, bases), "the scaling must change something"


def test_yarn_follows_its_paper():
    """arXiv:2309.00071: a dim that turns r = L / wavelength times over the original length is kept for r above
    beta_fast, divided for r below beta_slow, on a ramp between (NTK-by-parts, section 3.2); temperature of eq. 15.

    The released code, which the models were trained with, ramps over the index of the dim, between the rounded
    indices of the two bounds, and not over r: so the ends are checked here, and that the ramp is straight."""
    config = RopeConfig(theta=10_000.0, scaling="yarn", factor=16.0, original_max_len=4096)
    radians, temperature = frequencies(config, HEAD)
    base = np.array([config.theta ** (-2 * i / HEAD) for i in range(HEAD // 2)])
    turns = config.original_max_len * base / (2 * math.pi)
    kept = (radians / base - 1 / config.factor) / (1 - 1 / config.factor)  # gamma of the paper's eq. 13
    assert np.allclose(kept[turns > config.beta_fast], 1)
    assert np.allclose(kept[turns < config.beta_slow], 0)
    between = np.flatnonzero((kept > 1e-9) & (kept < 1 - 1e-9))
    assert len(between) > 5
    assert np.allclose(np.diff(kept[between]), np.diff(kept[between])[0])
    low, high = np.flatnonzero(turns >= config.beta_fast)[-1], np.flatnonzero(turns <= config.beta_slow)[0]
    assert np.allclose(np.diff(kept[between])[0], -1 / (high - low))
    assert temperature == pytest.approx(0.1 * math.log(16) + 1)


def test_yarn_scales_scores_by_the_temperature_squared():
    plain, scaled = RopeConfig(), RopeConfig(scaling="yarn", factor=16.0, original_max_len=1 << 30)  # all dims are kept
    factor = (0.1 * math.log(16) + 1) ** 2
    assert furthest(scores(scaled, 5, 0), factor * scores(plain, 5, 0)) < 1e-3
