"""Causal attention in plain JAX: the answer other kernels are checked against, and the CPU's fast path.

Grouped queries read their shared key head in place (no repeat), softmax is float32, and probabilities are
rounded to the compute dtype before they meet the values, as the GPU and TPU kernels do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Rows up to this length are computed in blocks of queries against the keys they can see; longer ones in a loop over
# as many queries against all keys, recomputed in the backward pass: B*H*CHUNK*S scores in memory, not B*H*T*S.
CHUNK = 512

# Skipping the keys after each block makes 2 blocks 1.3 times as fast as one, forward and backward, on 2 CPU cores
# (T=128, 4 heads of 48); blocks below 64 queries waste it again on small products.
SMALLEST_BLOCK, MOST_BLOCKS = 64, 4

_NEVER = -1e30  # finite: a row of nothing but masked scores must not become NaN


def reference_attention(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, *, window, softcap, scale):
    """out_BTHK of causal attention inside segments. See `maxlm.kernels.attention.attention`."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BGRTK = jnp.transpose(q_BTHK.reshape(B, T, G, H // G, K), (0, 2, 3, 1, 4))
    k_BGSK, v_BGSK = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k_BSGK, v_BSGK))

    def attend(q_BGRtK, segments_Bt, first, keys=slice(0, T)):
        """The queries from `first` on, against the keys of a slice."""
        position_t1 = first + jnp.arange(q_BGRtK.shape[3])[:, None]
        distance_ts = position_t1 - jnp.arange(T)[None, keys]
        near_ts = distance_ts >= 0
        if window is not None:
            near_ts &= distance_ts < window
        seen_Bts = near_ts[None] & (segments_Bt[:, :, None] == segment_ids_BT[:, None, keys])
        return _softmax_mix(q_BGRtK, k_BGSK[:, :, keys], v_BGSK[:, :, keys], seen_Bts, softcap=softcap, scale=scale)

    if T <= CHUNK:
        size = max(SMALLEST_BLOCK, -(-T // MOST_BLOCKS))
        blocks = []
        for first in range(0, T, size):
            last = min(first + size, T)
            keys = slice(0 if window is None else max(0, first - window + 1), last)
            blocks.append(attend(q_BGRTK[:, :, :, first:last], segment_ids_BT[:, first:last], first, keys))
        out_BGRTK = jnp.concatenate(blocks, axis=3)
    else:
        out_BGRTK = _loop(attend, q_BGRTK, segment_ids_BT)
    return jnp.transpose(out_BGRTK, (0, 3, 1, 2, 4)).reshape(B, T, H, K)


def _loop(attend, q_BGRTK, segment_ids_BT):
    B, G, R, T, K = q_BGRTK.shape
    count = -(-T // CHUNK)
    padding = count * CHUNK - T
    q = jnp.pad(q_BGRTK, ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0)))
    q_cBGRtK = jnp.moveaxis(q.reshape(B, G, R, count, CHUNK, K), 3, 0)
    segments_cBt = jnp.moveaxis(jnp.pad(segment_ids_BT, ((0, 0), (0, padding))).reshape(B, count, CHUNK), 1, 0)
    piece = jax.checkpoint(lambda args: attend(*args))
    out_cBGRtK = jax.lax.map(piece, (q_cBGRtK, segments_cBt, CHUNK * jnp.arange(count)))
    return jnp.moveaxis(out_cBGRtK, 0, 3).reshape(B, G, R, count * CHUNK, K)[:, :, :, :T]


def _softmax_mix(q_BGRTK, k_BGSK, v_BGSK, seen_BTS, *, softcap, scale):
    B, G, R, T, K = q_BGRTK.shape
    q_BGtK = q_BGRTK.reshape(B, G, R * T, K)  # the heads of a group are more rows of one product
    scores_BGtS = scale * jnp.einsum("bgtk,bgsk->bgts", q_BGtK, k_BGSK, preferred_element_type=jnp.float32)
    if softcap:
        scores_BGtS = softcap * jnp.tanh(scores_BGtS / softcap)
    scores_BGtS = jnp.where(jnp.tile(seen_BTS, (1, R, 1))[:, None], scores_BGtS, _NEVER)
    probabilities = jax.nn.softmax(scores_BGtS, axis=-1).astype(v_BGSK.dtype)
    return jnp.einsum("bgts,bgsk->bgtk", probabilities, v_BGSK).reshape(B, G, R, T, K)
