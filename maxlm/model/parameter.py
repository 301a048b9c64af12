"""One declaration a parameter: shape, logical dims and initializer stand together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.parallel.sharding import Dims


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], dims: Dims, std: float, contracted: tuple[int, ...] = (),
           produced: tuple[int, ...] = ()) -> nnx.Param:
    """A float32 weight, normal with standard deviation `std`, truncated at three of them.

    Its product contracts the dims `contracted` and makes the dims `produced`; dims in neither hold several matrices
    side by side. Left empty for tables, which are looked up.
    """
    assert len(shape) == len(dims)
    value = std * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)
    return nnx.Param(value, dims=dims, contracted=contracted, produced=produced)


def scale(size: int, dim: str = "norm") -> nnx.Param:
    """A float32 gain of ones."""
    return nnx.Param(jnp.ones((size,), jnp.float32), dims=(dim,), contracted=())
