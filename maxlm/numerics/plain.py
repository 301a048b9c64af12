"""Matrix products in the compute dtype: float32 or bfloat16."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from maxlm.parallel.sharding import ACTIVATION, Dims, has_mesh, spec, use, whole_length


@dataclass(frozen=True)
class Plain:
    """Products of operands in `dtype`, accumulated in float32 and rounded to `dtype`, gradients as well."""

    dtype: jnp.dtype

    def einsum(self, subscripts: str, x: jax.Array, weight: nnx.Param, out: Dims) -> jax.Array:
        """`jnp.einsum` of activations x [B, T, ...] and a weight, whose result has logical dims `out`; where both
        operands are split along a contracted dim, this is the sum over that mesh axis. An x in the layout of the
        residual stream is gathered, here and again for the weight's gradient, and kept as it is."""
        return _product(subscripts, spec(out, ACTIVATION) if has_mesh() else None, x, use(weight, self.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(subscripts: str, sharding: P | None, x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, whole_length(x), w, out_sharding=sharding)


def _product_forward(subscripts, sharding, x, w):
    return _product(subscripts, sharding, x, w), (x, w)


def _product_backward(subscripts, sharding, kept, g):
    # The weight's gradient has x on the left. Autodiff puts g there, whose product comes out as the transpose of the
    # weight, and XLA turns it round piece by piece: a tenth of quickstart's step on a CPU.
    (x, w), (operands, y) = kept, subscripts.split("->")
    a, b = operands.split(",")
    layout = [jax.typeof(v).sharding.spec if has_mesh() else None for v in kept]
    x, g = whole_length(x), whole_length(g)
    dx = jnp.einsum(f"{y},{b}->{a}", g, w, out_sharding=layout[0])
    dw = jnp.einsum(f"{a},{y}->{b}", x, g, out_sharding=layout[1])
    return dx, dw


_product.defvjp(_product_forward, _product_backward)
