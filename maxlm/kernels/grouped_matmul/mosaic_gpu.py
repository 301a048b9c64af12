"""The grouped product on Hopper GPUs, through the Pallas-Mosaic kernels that come with JAX.

Tiles are those that ran fastest on an H100 (docs/MOE.md). The kernels write no row behind the last group, so what they
leave there is replaced by zeros, both ways: the weights' gradient multiplies the rows of a group's last tile, and
anything times an unwritten NaN is NaN. In a `shard_map` the kernels do not say over which axes their result varies;
what the group sizes select does.

Each product is jitted by itself so that equal ones are one kernel: Mosaic compiles a kernel of 64 groups in seconds,
and calls that are lowered one by one count as different.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

_FORWARD = {"block_m": 192, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 4}
_WEIGHTS = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 4}


@jax.custom_vjp
def mosaic_gpu_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`grouped_matmul` in bfloat16 or float16; D and F are multiples of 128."""
    return _product(x_RD, w_EDF, sizes_E, transpose_rhs=False)


@functools.partial(jax.jit, static_argnames="transpose_rhs")
def _product(x_RD, w_EDF, sizes_E, *, transpose_rhs):
    out_RF = ragged_dot(x_RD, w_EDF, group_sizes=sizes_E, transpose_rhs=transpose_rhs, **_FORWARD)
    return _cleared(out_RF, sizes_E)


def _backward(kept, g_RF):
    x_RD, w_EDF, sizes_E = kept
    x_RD, g_RF = _cleared(x_RD, sizes_E), _cleared(g_RF, sizes_E)
    dx_RD = _product(g_RF, w_EDF, sizes_E, transpose_rhs=True)
    return dx_RD, _weights_gradient(x_RD, g_RF, sizes_E), None


@jax.jit
def _weights_gradient(x_RD, g_RF, sizes_E):
    dw_EDF = transposed_ragged_dot(x_RD, g_RF, group_sizes=sizes_E, **_WEIGHTS)
    return jnp.where((sizes_E > 0)[:, None, None], dw_EDF, 0)


mosaic_gpu_matmul.defvjp(lambda x, w, sizes: (mosaic_gpu_matmul(x, w, sizes), (x, w, sizes)), _backward)


def _cleared(rows: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Zeros behind the last group; the compiler makes this where the rows are read."""
    held_R = jnp.arange(rows.shape[0]) < jnp.sum(sizes_E)
    return jnp.where(held_R[:, None], rows, 0)
