"""Attention of some tokens of a row to others, and how the parts of a softmax are put together.

`forward` gives the result over the keys it was shown and their log-sum-exp; `merged` makes of two such parts what both
sets of keys together would have given; `backward` takes the log-sum-exp over all keys, so that each part's gradient is
simply a summand (FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2). Plain JAX: scores exist for CHUNK queries
against the keys at one time.

Dims: B batch, G key heads, R query heads of each, T queries, S keys, K head dim.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxlm.kernels.attention.reference import CHUNK

NEVER = -1e30  # finite: a part in which a query sees nothing must not make NaN


class Tokens(NamedTuple):
    """Which tokens these are: where in the row, int32 [T], and in which document, int32 [B, T]."""

    index_T: jax.Array
    segments_BT: jax.Array


class Part(NamedTuple):
    """Of some queries over some keys, float32: softmax-weighted values [B, G, R, T, K], log-sum-exp [B, G, R, T]."""

    out: jax.Array
    lse: jax.Array


class Scoring(NamedTuple):
    """What `attention` takes by these names."""

    window: int | None
    softcap: float
    scale: float


def heads_first(q_BTHK: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, H, K] -> [B, G, R, T, K]."""
    B, T, H, K = q_BTHK.shape
    return jnp.transpose(q_BTHK.reshape(B, T, kv_heads, H // kv_heads, K), (0, 2, 3, 1, 4))


def heads_last(x_BGRTK: jax.Array) -> jax.Array:
    """[B, G, R, T, K] -> [B, T, H, K]."""
    B, G, R, T, K = x_BGRTK.shape
    return jnp.transpose(x_BGRTK, (0, 3, 1, 2, 4)).reshape(B, T, G * R, K)


def merged(a: Part, b: Part) -> Part:
    lse = jnp.logaddexp(a.lse, b.lse)
    return Part(sum(part.out * jnp.exp(part.lse - lse)[..., None] for part in (a, b)), lse)


def forward(q_BGRTK, k_BGSK, v_BGSK, queries: Tokens, keys: Tokens, how: Scoring) -> Part:
    def piece(rows):
        q, queries = rows
        scores, _ = _scores(q, k_BGSK, queries, keys, how)
        lse = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.exp(scores - lse[..., None]).astype(v_BGSK.dtype)
        return Part(jnp.einsum("bgrts,bgsk->bgrtk", weights, v_BGSK, preferred_element_type=jnp.float32), lse)

    if q_BGRTK.shape[3] <= CHUNK:
        return piece((q_BGRTK, queries))
    parts = jax.lax.map(piece, _pieces((q_BGRTK, queries)))
    return Part(*(_joined(x, 3, q_BGRTK.shape[3]) for x in parts))


def backward(q_BGRTK, k_BGSK, v_BGSK, queries: Tokens, keys: Tokens, how: Scoring, lse_BGRT, delta_BGRT, dout_BGRTK):
    """(dq, dk, dv), float32. lse: over all keys the queries see; delta: sum over K of the whole result times dout."""

    def piece(rows):
        q, lse, delta, dout, queries = rows
        scores, slope = _scores(q, k_BGSK, queries, keys, how)
        weights = jnp.exp(scores - lse[..., None])
        dweights = jnp.einsum("bgrtk,bgsk->bgrts", dout, v_BGSK, preferred_element_type=jnp.float32)
        dscores = (weights * (dweights - delta[..., None]) * slope * how.scale).astype(q.dtype)
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        return (einsum("bgrts,bgsk->bgrtk", dscores, k_BGSK), einsum("bgrts,bgrtk->bgsk", dscores, q),
                einsum("bgrts,bgrtk->bgsk", weights.astype(dout.dtype), dout))

    rows = (q_BGRTK, lse_BGRT, delta_BGRT, dout_BGRTK, queries)
    if q_BGRTK.shape[3] <= CHUNK:
        return piece(rows)

    def add(totals, rows):
        dq, *of_keys = piece(rows)
        return tuple(map(jnp.add, totals, of_keys)), dq

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k_BGSK, v_BGSK))
    (dk, dv), dq = jax.lax.scan(add, zeros, _pieces(rows))
    return _joined(dq, 3, q_BGRTK.shape[3]), dk, dv


def _scores(q_BGRTK, k_BGSK, queries, keys, how):
    """Masked scores [B, G, R, T, S], float32, and what the soft cap multiplies their gradient with."""
    scores = how.scale * jnp.einsum("bgrtk,bgsk->bgrts", q_BGRTK, k_BGSK, preferred_element_type=jnp.float32)
    slope = jnp.float32(1.0)
    if how.softcap:
        bent = jnp.tanh(scores / how.softcap)
        scores, slope = how.softcap * bent, 1 - jnp.square(bent)
    distance_TS = queries.index_T[:, None] - keys.index_T[None, :]
    near_TS = distance_TS >= 0
    if how.window is not None:
        near_TS &= distance_TS < how.window
    seen_BTS = near_TS[None] & (queries.segments_BT[:, :, None] == keys.segments_BT[:, None, :])
    return jnp.where(seen_BTS[:, None, None], scores, NEVER), slope


def _pieces(rows):
    """CHUNK queries at a time, the last filled up with queries that add nothing: their dout is 0."""

    def cut(x):
        axis = {1: 0, 2: 1}.get(x.ndim, 3)  # of the tokens: [T], [B, T], or behind [B, G, R]
        count = -(-x.shape[axis] // CHUNK)
        widths = [(0, count * CHUNK - x.shape[axis] if dim == axis else 0) for dim in range(x.ndim)]
        parts = jnp.pad(x, widths).reshape(*x.shape[:axis], count, CHUNK, *x.shape[axis + 1 :])
        return jnp.moveaxis(parts, axis, 0)

    return jax.tree.map(cut, rows)


def _joined(parts, axis, length):
    joined = jnp.moveaxis(parts, 0, axis)
    joined = joined.reshape(*joined.shape[:axis], -1, *joined.shape[axis + 2 :])
    return jax.lax.slice_in_dim(joined, 0, length, axis=axis)
