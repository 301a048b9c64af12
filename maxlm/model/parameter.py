"""One declaration a parameter: shape, logical dims and initializer stand together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.parallel.sharding import Dims


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], dims: Dims, std: float) -> nnx.Param:
    """A float32 weight, normal with standard deviation `std`, truncated at three of them."""
    assert len(shape) == len(dims)
    return nnx.Param(std * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32), dims=dims)


def scale(size: int, dim: str = "norm") -> nnx.Param:
    """A float32 gain of ones."""
    return nnx.Param(jnp.ones((size,), jnp.float32), dims=(dim,))
