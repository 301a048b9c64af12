"""Experts' gated units (SwiGLU) on Hopper GPUs, made where products end, with no pass of their own over memory.

Dims: R rows in order of their group, E groups, K contracted, F hidden units.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from maxlm.kernels.grouped_matmul.hopper import ROWS, over_rows
from maxlm.kernels.grouped_matmul.persistent import SQUARE, Tiles

FORWARD = Tiles(ROWS, 128, "rows", 4)
_INDEX = () if jax.__version_info__ >= (0, 11) else (slice(None),)  # JAX 0.10 asks for one


def _backward_tiles(columns: int) -> Tiles:
    return Tiles(ROWS, 256, "rows", 4) if columns % 256 == 0 else Tiles(ROWS, 128, "rows", 6)


def gated_product(x_RK: jax.Array, gate: jax.Array, up: jax.Array, sizes_E: jax.Array,
                  weight_R: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(gate_RF, up_RF, silu(gate) * up * weight_R): the first two as by `grouped_product`, with gate and up [E, K, F].

    weight_R: float32. Gate and up are rounded before they are used, as the backward pass will find them.
    """
    def results(weight, beside, *sums):
        gate, up = (total.astype(x_RK.dtype) for total in sums)
        yield 0, 0, gate
        yield 1, 0, up
        gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
        yield 2, 0, gate * jax.nn.sigmoid(gate) * up * lax.broadcast_in_dim(weight, up.shape, (0,))

    return tuple(over_rows([(x_RK, (gate, up))], sizes_E, (weight_R,), _weights_of_rows, results, 3, b_last=False,
                           tiles=FORWARD))


def gated_gradients(g_RK: jax.Array, down: jax.Array, sizes_E: jax.Array, gate_RF: jax.Array, up_RF: jax.Array,
                    weight_R: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """From the gradient of the units' product with down [E, F, K]: those of gate, up and (float32) weight_R, and the
    units again: (dgate_RF, dup_RF, h_RF, dweight_R)."""
    def results(weight, beside, total):
        dweight = jnp.zeros(total.shape[0], jnp.float32)
        for index, first in enumerate(range(0, total.shape[1], SQUARE)):
            gate, up = (a.astype(jnp.float32) for a in beside(index))
            dh, sigmoid = total[:, first : first + SQUARE], jax.nn.sigmoid(gate)
            silu = gate * sigmoid
            dweight += jnp.sum(silu * up * dh, axis=1)
            weight_here = lax.broadcast_in_dim(weight, dh.shape, (0,))
            yield 0, first, dh * weight_here * up * (sigmoid + silu * (1 - sigmoid))
            yield 1, first, dh * weight_here * silu
            yield 2, first, silu * up * weight_here
        yield 3, 0, dweight

    *outs, dweight_CR = over_rows([(g_RK, (down,))], sizes_E, (weight_R,), _weights_of_rows, results, 3, b_last=True,
                                  tiles=_backward_tiles(up_RF.shape[1]), beside=(gate_RF, up_RF))
    return *outs, jnp.sum(dweight_CR, axis=0)


def _weights_of_rows(refs, group, rows):
    assert refs[0].dtype == jnp.float32, refs[0].dtype
    return plgpu.load(refs[0].at[rows], *_INDEX, optimized=False)
