"""Attention over rows that are split along `context`, by bringing whole rows together.

`gathered_attention`: each device gathers the keys and values of the row. The way of Llama 3 (arXiv:2407.21783, section
3.3.2): with few key heads they are small beside what the products of a layer take, and one kernel call serves the row.
The gradients of keys and values are scattered in the compute dtype. With the zig-zag split of parallel/context.py every
device's queries see as many keys as those of any other.

`exchanged_attention`: devices exchange heads for tokens, so that each has whole rows of some heads, which any kernel
serves as it is (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels.attention.parts import Scoring, Tokens, backward, forward, heads_first, heads_last
from maxlm.parallel.context import AXIS, device_order, natural_order, token_index


def gathered_attention(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, *, window, softcap, scale):
    """out_BTHK of causal attention inside segments, for use inside a `shard_map`; T: this device's tokens of a row.
    Plain JAX, which computes the scores of all keys."""
    k_BSGK, v_BSGK, segments_BS = whole_rows(k_BTGK), whole_rows(v_BTGK), whole_rows(segment_ids_BT)
    return _attend(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, segments_BS, Scoring(window, softcap, scale))


def exchanged_attention(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, *, attend):
    """out_BTHK, where `attend` serves whole rows (q, k, v, segment ids) of H / C and G / C heads. C divides G."""
    ways = jax.lax.axis_size(AXIS)

    def rows_of_some_heads(x_BTHK):
        return natural_order(jax.lax.all_to_all(x_BTHK, AXIS, split_axis=2, concat_axis=1, tiled=True), ways)

    out = attend(*map(rows_of_some_heads, (q_BTHK, k_BTGK, v_BTGK)), whole_rows(segment_ids_BT))
    return jax.lax.all_to_all(device_order(out, ways), AXIS, split_axis=1, concat_axis=2, tiled=True)


def whole_rows(x_BT):
    """[B, T, ...] of this device -> [B, C * T, ...] of the row in its order."""
    return natural_order(jax.lax.all_gather(x_BT, AXIS, axis=1, tiled=True), jax.lax.axis_size(AXIS))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BTHK, k_BSGK, v_BSGK, segments_BT, segments_BS, how):
    return _forward(q_BTHK, k_BSGK, v_BSGK, segments_BT, segments_BS, how)[0]


def _forward(q_BTHK, k_BSGK, v_BSGK, segments_BT, segments_BS, how):
    part = forward(*_arguments(q_BTHK, k_BSGK, v_BSGK, segments_BT, segments_BS), how)
    # Named in here, because a remat policy that saves the result alone would compute its statistics again.
    results = heads_last(part.out).astype(q_BTHK.dtype), part.lse
    out_BTHK, lse_BGRT = (checkpoint_name(x, "attention") for x in results)
    return out_BTHK, (q_BTHK, k_BSGK, v_BSGK, segments_BT, segments_BS, out_BTHK, lse_BGRT)


def _backward(how, kept, dout_BTHK):
    *inputs, out_BTHK, lse_BGRT = kept
    q_BTHK, k_BSGK = inputs[:2]
    out, dout = (heads_first(x, k_BSGK.shape[2]) for x in (out_BTHK, dout_BTHK))
    delta_BGRT = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    dq, dk, dv = backward(*_arguments(*inputs), how, lse_BGRT, delta_BGRT, dout)
    dk, dv = (jnp.transpose(x, (0, 2, 1, 3)).astype(k_BSGK.dtype) for x in (dk, dv))
    return heads_last(dq).astype(q_BTHK.dtype), dk, dv, None, None


_attend.defvjp(_forward, _backward)


def _arguments(q_BTHK, k_BSGK, v_BSGK, segments_BT, segments_BS):
    length = q_BTHK.shape[1]
    index_T = token_index(jax.lax.axis_index(AXIS), length, jax.lax.axis_size(AXIS))
    k, v = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k_BSGK, v_BSGK))
    queries, keys = Tokens(index_T, segments_BT), Tokens(jnp.arange(k.shape[2], dtype=jnp.int32), segments_BS)
    return heads_first(q_BTHK, k.shape[1]), k, v, queries, keys
