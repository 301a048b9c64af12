"""Rotary position embedding and its long-context scalings (sources in config.RopeConfig)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import RopeConfig


class Rotation(NamedTuple):
    """Cosines and sines of every position's angles, float32, each [B, T, 1, K/2]."""

    cos: jax.Array
    sin: jax.Array


def frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians a position, [K/2], and the factor on cos and sin (YaRN's attention temperature, 1 otherwise)."""
    base = config.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.scaling == "linear":
        return base / config.factor, 1.0
    if config.scaling == "llama3":
        wavelength = 2 * math.pi / base
        ramp = (config.original_max_len / wavelength - config.low_freq_factor) / (
            config.high_freq_factor - config.low_freq_factor
        )
        keep = np.clip(ramp, 0.0, 1.0)
        return base * keep + base / config.factor * (1 - keep), 1.0
    if config.scaling == "yarn":

        def dim_of(rotations: float) -> float:  # the dim that turns `rotations` times over the original length
            turns = config.original_max_len / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(config.theta))

        low = max(math.floor(dim_of(config.beta_fast)), 0)
        high = min(math.ceil(dim_of(config.beta_slow)), head_dim - 1)
        interpolate = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        temperature = 0.1 * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0
        return base / config.factor * interpolate + base * (1 - interpolate), temperature
    return base, 1.0


def rotation(config: RopeConfig, head_dim: int, positions_BT: jax.Array) -> Rotation:
    """The rotation of every position. Computed once a batch, outside the layer loop."""
    radians, temperature = frequencies(config, head_dim)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * jnp.asarray(radians, jnp.float32)[None, None, None, :]
    return Rotation(jnp.cos(angles) * temperature, jnp.sin(angles) * temperature)


def rotate(x_BTHK: jax.Array, by: Rotation) -> jax.Array:
    """Rotates dim i with dim i + K/2 of each head (the layout of Llama's released weights), in float32."""
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1
    ).astype(x_BTHK.dtype)
