"""Causal attention in plain JAX: the answer other kernels are checked against, and the CPU's fast path.

Grouped queries read their shared key head in place (no repeat), softmax is float32, and probabilities are
rounded to the compute dtype before they meet the values, as the GPU and TPU kernels do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Rows up to this length are computed in one piece; longer ones in pieces of this many queries, each
# recomputed in the backward pass, so that scores take B*H*CHUNK*S values and not B*H*T*S.
CHUNK = 512

_NEVER = -1e30  # finite: a row of nothing but masked scores must not become NaN


def reference_attention(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, *, window, softcap, scale):
    """out_BTHK of causal attention inside segments. See `maxlm.kernels.attention.attention`."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BGRTK = jnp.transpose(q_BTHK.reshape(B, T, G, H // G, K), (0, 2, 3, 1, 4))
    k_BGSK, v_BGSK = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k_BSGK, v_BSGK))

    def queries(q_BGRtK, segments_Bt, first):
        position_t = first + jnp.arange(q_BGRtK.shape[3])
        position_S = jnp.arange(T)
        distance_tS = position_t[:, None] - position_S[None, :]
        near_tS = distance_tS >= 0
        if window is not None:
            near_tS &= distance_tS < window
        seen_BtS = near_tS[None] & (segments_Bt[:, :, None] == segment_ids_BT[:, None, :])
        return _softmax_mix(q_BGRtK, k_BGSK, v_BGSK, seen_BtS, softcap=softcap, scale=scale)

    if T <= CHUNK:
        out_BGRTK = queries(q_BGRTK, segment_ids_BT, 0)
    else:
        out_BGRTK = _chunked(queries, q_BGRTK, segment_ids_BT)
    return jnp.transpose(out_BGRTK, (0, 3, 1, 2, 4)).reshape(B, T, H, K)


def _chunked(queries, q_BGRTK, segment_ids_BT):
    B, G, R, T, K = q_BGRTK.shape
    count = -(-T // CHUNK)
    padding = count * CHUNK - T
    q = jnp.pad(q_BGRTK, ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0)))
    q_cBGRtK = jnp.moveaxis(q.reshape(B, G, R, count, CHUNK, K), 3, 0)
    segments_cBt = jnp.moveaxis(jnp.pad(segment_ids_BT, ((0, 0), (0, padding))).reshape(B, count, CHUNK), 1, 0)
    piece = jax.checkpoint(lambda args: queries(*args))
    out_cBGRtK = jax.lax.map(piece, (q_cBGRtK, segments_cBt, CHUNK * jnp.arange(count)))
    return jnp.moveaxis(out_cBGRtK, 0, 3).reshape(B, G, R, count * CHUNK, K)[:, :, :, :T]


def _softmax_mix(q_BGRTK, k_BGSK, v_BGSK, seen_BTS, *, softcap, scale):
    B, G, R, T, K = q_BGRTK.shape
    q_BGtK = (q_BGRTK * jnp.asarray(scale, q_BGRTK.dtype)).reshape(B, G, R * T, K)
    scores = jnp.einsum("bgtk,bgsk->bgts", q_BGtK, k_BGSK, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores_BGRTS = scores.reshape(B, G, R, T, -1)
    probabilities = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores_BGRTS, _NEVER), axis=-1)
    mixed = jnp.einsum("bgts,bgsk->bgtk", probabilities.reshape(B, G, R * T, -1).astype(v_BGSK.dtype), v_BGSK)
    return mixed.reshape(B, G, R, T, K)
