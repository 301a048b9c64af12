"""Root-mean-square layer normalisation (Zhang & Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.model.parameter import scale


class RMSNorm(nnx.Module):
    """x / rms(x) * gain over the last dim, computed in float32 and returned in x's dtype."""

    def __init__(self, size: int, eps: float):
        self.gain = scale(size)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        gain = self.gain[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * inverse_rms * gain).astype(x.dtype)
