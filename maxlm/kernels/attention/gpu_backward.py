"""The backward pass of causal attention on a GPU with the same bits every time, in Pallas.

cuDNN's adds up dq with atomics, in whatever order its blocks come. Here one kernel owns each block of dq and one each
block of dk and dv, as in FlashAttention-2 (arXiv:2307.08691, algorithm 2, made twice), and each sums in a fixed order.
What a query sees is one range of keys: from the start of its document or window up to itself. Blocks outside of it are
not visited, so packed rows cost what their documents do, and one call serves every batch.

JAX has deprecated Pallas on Triton (0.11) for Mosaic, whose kernels are written for one generation of chips.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from maxlm.kernels.attention.choose import DETERMINISTIC_BLOCK as BLOCK

_NUM_WARPS, _NUM_STAGES = 4, 2


def attention_backward(q_BTHK, k_BTGK, v_BTGK, out_BTHK, lse_BHT, dout_BTHK, segment_ids_BT, *, window, scale,
                       interpret=False):
    """(dq_BTHK, dk_BTGK, dv_BTGK) of softmax(scale * q k^T) v inside segments.

    lse_BHT: float32 log-sum-exp of each query's scores. T is a multiple of BLOCK; K of 16, and padded to a power of two
    inside. Products take the inputs' dtype and accumulate in float32.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    delta_BHT = jnp.einsum("bthk,bthk->bht", out_BTHK, dout_BTHK, preferred_element_type=jnp.float32)
    low_BT, high_BT = visible(segment_ids_BT, window)
    wide = 2 * BLOCK if T % (2 * BLOCK) == 0 else BLOCK
    shared = {
        "compiler_params": plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=_NUM_STAGES), "interpret": interpret
    }
    depth = pl.next_power_of_2(K)

    def whole(group):  # all positions of the heads that go with this grid point
        return pl.BlockSpec((None, T, group, depth), lambda b, h, i: (b, 0, h, 0))

    def block(size):
        return pl.BlockSpec((None, size, None, depth), lambda b, h, i: (b, i, h, 0))

    positions = pl.BlockSpec((None, T), lambda b, h, i: (b, 0))
    dq_BTHK = pl.pallas_call(
        partial(_dq_kernel, scale=scale, rows=wide, columns=BLOCK, depth=K),
        grid=(B, H, T // wide),
        in_specs=[
            block(wide),
            *[pl.BlockSpec((None, T, None, depth), lambda b, h, i: (b, 0, h // (H // G), 0))] * 2,
            block(wide),
            *[pl.BlockSpec((None, None, wide), lambda b, h, i: (b, h, i))] * 2,
            positions,
        ],
        out_specs=block(wide),
        out_shape=jax.ShapeDtypeStruct(q_BTHK.shape, q_BTHK.dtype),
        name="attention_dq",
        **shared,
    )(q_BTHK, k_BTGK, v_BTGK, dout_BTHK, lse_BHT, delta_BHT, low_BT)
    dk_BTGK, dv_BTGK = pl.pallas_call(
        partial(_dkv_kernel, scale=scale, rows=BLOCK, columns=wide, depth=K, heads=H // G),
        grid=(B, G, T // wide),
        in_specs=[
            whole(H // G), block(wide), block(wide), whole(H // G),
            *[pl.BlockSpec((None, H // G, T), lambda b, g, j: (b, g, 0))] * 2,
            positions, positions,
        ],
        out_specs=[block(wide)] * 2,
        out_shape=[jax.ShapeDtypeStruct(k_BTGK.shape, k_BTGK.dtype)] * 2,
        name="attention_dkv",
        **shared,
    )(q_BTHK, k_BTGK, v_BTGK, dout_BTHK, lse_BHT, delta_BHT, low_BT, high_BT)
    return dq_BTHK, dk_BTGK, dv_BTGK


def visible(segment_ids_BT, window):
    """(first key that each query sees, the query after the last that sees each key), both [B, T] int32 and rising."""
    T = segment_ids_BT.shape[1]
    place_1T = jnp.arange(T, dtype=jnp.int32)[None]
    starts_BT = jnp.ones_like(segment_ids_BT, bool).at[:, 1:].set(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1])
    ends_BT = jnp.roll(starts_BT, -1, axis=1)  # the first position of every row is a start
    low_BT = jax.lax.cummax(jnp.where(starts_BT, place_1T, 0), axis=1)
    high_BT = jax.lax.cummin(jnp.where(ends_BT, place_1T + 1, T), axis=1, reverse=True)
    if window is not None:
        low_BT = jnp.maximum(low_BT, place_1T - window + 1)
        high_BT = jnp.minimum(high_BT, place_1T + window)
    return low_BT, high_BT


def _dq_kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, low_ref, dq_ref, *, scale, rows, columns, depth):
    inside = _inside(q_ref.shape[-1], depth)
    first = pl.program_id(2) * rows
    row = first + jnp.arange(rows)
    q, dout = (plgpu.load(ref, mask=inside, other=0.0) for ref in (q_ref, dout_ref))
    lse, delta, low = lse_ref[...], delta_ref[...], low_ref[pl.ds(first, rows)]

    def add(j, dq):
        keys = pl.ds(j * columns, columns)
        k, v = (plgpu.load(ref.at[keys, :], mask=inside, other=0.0) for ref in (k_ref, v_ref))
        column = j * columns + jnp.arange(columns)
        _, ds = _probabilities(q, k, v, dout, lse, delta, _seen(row, column, low), scale)
        return dq + plgpu.dot(ds.astype(k.dtype), k)

    start = jnp.zeros(q.shape, jnp.float32)
    dq = jax.lax.fori_loop(low_ref[first] // columns, pl.cdiv(first + rows, columns), add, start)
    plgpu.store(dq_ref, dq.astype(dq_ref.dtype), mask=inside)


def _dkv_kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, low_ref, high_ref, dk_ref, dv_ref, *, scale, rows,
                columns, depth, heads):
    inside = _inside(k_ref.shape[-1], depth)
    first = pl.program_id(2) * columns
    column = first + jnp.arange(columns)
    k, v = (plgpu.load(ref, mask=inside, other=0.0) for ref in (k_ref, v_ref))
    below, above = first // rows, pl.cdiv(high_ref[first + columns - 1], rows)

    def add(n, sums):
        dk, dv = sums
        head, i = n // (above - below), below + n % (above - below)
        queries = pl.ds(i * rows, rows)
        q, dout = (plgpu.load(ref.at[queries, head, :], mask=inside, other=0.0) for ref in (q_ref, dout_ref))
        lse, delta, low = lse_ref[head, queries], delta_ref[head, queries], low_ref[queries]
        row = i * rows + jnp.arange(rows)
        p, ds = _probabilities(q, k, v, dout, lse, delta, _seen(row, column, low), scale)
        return dk + plgpu.dot(ds.astype(q.dtype).T, q), dv + plgpu.dot(p.astype(dout.dtype).T, dout)

    start = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, heads * (above - below), add, (start, start))
    plgpu.store(dk_ref, dk.astype(dk_ref.dtype), mask=inside)
    plgpu.store(dv_ref, dv.astype(dv_ref.dtype), mask=inside)


def _probabilities(q, k, v, dout, lse, delta, seen, scale):
    """The softmax of a block of scores, made again from its log-sum-exp, and the gradient at the scores."""
    p = jnp.where(seen, jnp.exp(plgpu.dot(q, k.T) * scale - lse[:, None]), 0.0)
    return p, p * (plgpu.dot(dout, v.T) - delta[:, None]) * scale


def _seen(row, column, low):
    return (column[None, :] <= row[:, None]) & (column[None, :] >= low[:, None])


def _inside(padded, depth):
    return (jnp.arange(padded) < depth)[None, :]
