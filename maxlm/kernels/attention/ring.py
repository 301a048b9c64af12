"""Attention over rows that are split along `context`: keys and values travel round a ring of the devices.

Liu et al. 2023 (arXiv:2310.01889), with the zig-zag split of parallel/context.py. A device holds an early chunk of the
row and a late one. Its late queries see the early keys of every device; of a device before it, its early queries see
the early keys; of a device behind it, its late queries see the late keys; nothing else is visible. So each turn is two
products of chunk with chunk, on every device alike, while the next device's keys are on their way.

The backward pass sends keys and values round again, and their gradients with them, in float32, until they are home.
Device memory holds the keys of two devices, never those of the row.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels.attention.parts import (
    NEVER,
    Scoring,
    Tokens,
    backward,
    forward,
    heads_first,
    heads_last,
    merged,
)
from maxlm.parallel.context import AXIS, token_index


def ring_attention(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, *, window, softcap, scale):
    """out_BTHK of causal attention inside segments, for use inside a `shard_map`; T: this device's tokens of a row."""
    return _ring(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, Scoring(window, softcap, scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, how):
    return _ring_forward(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, how)[0]


def _ring_forward(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, how):
    early, late, held = _sides(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT)
    keys_early, keys_late = _keys(held, jax.lax.axis_index(AXIS))
    show = lambda side, keys: forward(side[0], keys[0], keys[1], side[1], keys[2], how)  # noqa: E731
    parts = show(early, keys_early), merged(show(late, keys_early), show(late, keys_late))

    def see(parts, held, turn):
        before, pairs = _visible(early, late, held, turn)
        in_early, in_late = parts
        always, either = (show(*pair) for pair in pairs)
        in_early = merged(in_early, either._replace(lse=jnp.where(before, either.lse, NEVER)))
        in_late = merged(merged(in_late, always), either._replace(lse=jnp.where(before, NEVER, either.lse)))
        return in_early, in_late

    def turn_on(carry, turn):
        parts, held = carry
        coming = _passed_on(held)
        return (see(parts, held, turn), coming), None

    ways = jax.lax.axis_size(AXIS)
    (parts, held), _ = jax.lax.scan(turn_on, (parts, _passed_on(held)), jnp.arange(1, ways - 1))
    whole = jax.tree.map(lambda *halves: jnp.concatenate(halves, axis=3), *see(parts, held, ways - 1))
    # Named in here, because a remat policy that saves the result alone would run all of it again for its statistics.
    out_BTHK = checkpoint_name(heads_last(whole.out).astype(q_BTHK.dtype), "attention")
    return out_BTHK, (q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, out_BTHK, checkpoint_name(whole.lse, "attention"))


def _ring_backward(how, kept, dout_BTHK):
    q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, out_BTHK, lse_BGRT = kept
    early, late, held = _sides(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT)
    out, dout = (heads_first(x, k_BTGK.shape[2]) for x in (out_BTHK, dout_BTHK))
    delta_BGRT = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    results = zip(*(jnp.split(x, 2, axis=3) for x in (lse_BGRT, delta_BGRT, dout)), strict=True)
    early, late = ((*side, *result) for side, result in zip((early, late), results, strict=True))

    def gradients(side, keys):
        q, queries, *result = side
        return backward(q, keys[0], keys[1], queries, keys[2], how, *result)

    def see(dq, held, dkv, turn):
        before, pairs = _visible(early, late, held, turn)
        (dq_always, *dkv_always), (dq_either, *dkv_either) = (gradients(*pair) for pair in pairs)
        dq_early, dq_late = dq
        dq = (dq_early + jnp.where(before, dq_either, 0), dq_late + dq_always + jnp.where(before, 0, dq_either))
        halves = lambda a, e: jnp.concatenate([a + jnp.where(before, e, 0), jnp.where(before, 0, e)], 2)  # noqa: E731
        return dq, jax.tree.map(lambda total, a, e: total + halves(a, e), dkv, tuple(dkv_always), tuple(dkv_either))

    keys_early, keys_late = _keys(held, jax.lax.axis_index(AXIS))
    parts = [gradients(early, keys_early), gradients(late, keys_early), gradients(late, keys_late)]
    dq = parts[0][0], parts[1][0] + parts[2][0]
    dkv = tuple(jnp.concatenate([parts[0][i] + parts[1][i], parts[2][i]], axis=2) for i in (1, 2))

    def turn_on(carry, turn):
        dq, held, dkv = carry
        coming = _passed_on(held)
        dq, dkv = see(dq, held, dkv, turn)
        return (dq, coming, _passed_on(dkv)), None

    ways = jax.lax.axis_size(AXIS)
    (dq, held, dkv), _ = jax.lax.scan(turn_on, (dq, _passed_on(held), _passed_on(dkv)), jnp.arange(1, ways - 1))
    dq, dkv = see(dq, held, dkv, ways - 1)
    dk, dv = (jnp.transpose(x, (0, 2, 1, 3)).astype(k_BTGK.dtype) for x in _passed_on(dkv))
    return heads_last(jnp.concatenate(dq, axis=3)).astype(q_BTHK.dtype), dk, dv, None


_ring.defvjp(_ring_forward, _ring_backward)


def _sides(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT):
    """((q, Tokens) of the early chunk, the same of the late one, what travels: k, v and segment ids), heads first."""
    index_T = token_index(jax.lax.axis_index(AXIS), q_BTHK.shape[1], jax.lax.axis_size(AXIS))
    queries = jnp.split(heads_first(q_BTHK, k_BTGK.shape[2]), 2, axis=3)
    tokens = map(Tokens, jnp.split(index_T, 2), jnp.split(segment_ids_BT, 2, axis=1))
    k, v = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k_BTGK, v_BTGK))
    return *zip(queries, tokens, strict=True), (k, v, segment_ids_BT)


def _keys(held, device):
    """(k, v, Tokens) of the early chunk of a device and of its late one."""
    k, v, segments_BT = held
    index_T = token_index(device, k.shape[2], jax.lax.axis_size(AXIS))
    tokens = map(Tokens, jnp.split(index_T, 2), jnp.split(segments_BT, 2, axis=1))
    return tuple(zip(jnp.split(k, 2, axis=2), jnp.split(v, 2, axis=2), tokens, strict=True))


def _visible(early, late, held, turn):
    """(whether the keys held at this turn are of a device before this one, the two pairs of queries and keys)."""
    me, ways = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)
    source = (me - turn) % ways
    keys_early, keys_late = _keys(held, source)
    choose = functools.partial(jax.tree.map, functools.partial(jnp.where, source < me))
    return source < me, ((late, keys_early), (choose(early, late), choose(keys_early, keys_late)))


def _passed_on(tree):
    """Each device's arrays at the device behind it."""
    ways = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(tree, AXIS, [(device, (device + 1) % ways) for device in range(ways)])
