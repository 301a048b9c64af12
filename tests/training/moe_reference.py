"""A mixture of experts as its formula reads: every expert computes every token, and a sum takes what was chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.model.mlp import ACTIVATIONS
from maxlm.model.moe.layer import MoE
from maxlm.model.moe.load import Load

HIGHEST = jax.lax.Precision.HIGHEST


def dense_moe(layer: MoE, x_BTD, segment_ids_BT, numerics, key):
    """What `MoE.__call__` must give on a mesh of one device, dropless."""
    layout = jax.typeof(x_BTD).sharding.spec
    whole = jax.tree.map(lambda a: jax.sharding.reshard(a, P()), (layer, x_BTD, segment_ids_BT))
    out_BTD, load = _dense_moe(*whole, key)
    shared = 0 if layer.shared is None else layer.shared(x_BTD, numerics)
    return jax.sharding.reshard(out_BTD, layout) + shared, load


def _dense_moe(layer, x_BTD, segment_ids_BT, key):
    model, moe = layer.config, layer.config.moe
    E, K = model.num_experts, model.experts_per_token
    seen_BTD = x_BTD
    if moe.jitter and key is not None:
        seen_BTD = x_BTD * jax.random.uniform(key, x_BTD.shape, jnp.float32, 1 - moe.jitter, 1 + moe.jitter)
    logits_BTE = jnp.einsum("btd,de->bte", seen_BTD, layer.router[...], precision=HIGHEST)
    score_BTE = jax.nn.softmax(logits_BTE) if moe.scores == "softmax" else jax.nn.sigmoid(logits_BTE)
    rank_BTE = score_BTE if layer.selection_bias is None else score_BTE + layer.selection_bias[...][None, None]
    if moe.num_groups > 1:
        by_group = rank_BTE.reshape(*rank_BTE.shape[:2], moe.num_groups, -1)
        best = jnp.sort(by_group, axis=-1)[..., -2:].sum(-1)
        worst_kept = jnp.sort(best, axis=-1)[..., -moe.groups_per_token][..., None]
        rank_BTE = jnp.where((best >= worst_kept)[..., None], by_group, -jnp.inf).reshape(rank_BTE.shape)
    chosen_BTE = jax.lax.stop_gradient(rank_BTE >= jnp.sort(rank_BTE, axis=-1)[..., -K][..., None])
    weight_BTE = jnp.where(chosen_BTE, score_BTE, 0)
    if moe.normalize_weights:
        weight_BTE = weight_BTE / weight_BTE.sum(-1, keepdims=True)
    bias = lambda name, e: getattr(layer, name)[...][e][None, None] if moe.expert_bias else 0  # noqa: E731
    out_BTD = jnp.zeros_like(x_BTD)
    for e in range(E):
        gate = x_BTD @ layer.gate[...][e] + bias("gate_bias", e)
        up = x_BTD @ layer.up[...][e] + bias("up_bias", e)
        out = (ACTIVATIONS[model.activation](gate) * up) @ layer.down[...][e] + bias("down_bias", e)
        out_BTD += moe.weight_scale * weight_BTE[..., e : e + 1] * out
    load = _load(logits_BTE, score_BTE, chosen_BTE.astype(jnp.float32), segment_ids_BT > 0, E, K, moe.balance_over)
    return out_BTD, load


def _load(logits_BTE, score_BTE, chosen_BTE, real_BT, E, K, balance_over):
    """Switch's loss, as its equation reads, of each row or of all rows as one."""
    mean = lambda a: jnp.sum(jnp.where(real_BT, a, 0)) / real_BT.sum()  # noqa: E731
    one = score_BTE / score_BTE.sum(-1, keepdims=True)

    def balance(chosen, one, real):
        return E * sum(jnp.sum(chosen[..., e] * real) / K * jnp.sum(one[..., e] * real) for e in range(E)) / real.sum()

    if balance_over == "batch":
        loss = balance(chosen_BTE, one, real_BT) / real_BT.sum()
    else:
        loss = sum(balance(chosen_BTE[b], one[b], real_BT[b]) for b in range(len(real_BT))) / real_BT.sum()
    chosen_E = jnp.stack([jnp.sum(jnp.where(real_BT, chosen_BTE[..., e], 0)) for e in range(E)])
    z = mean(jax.nn.logsumexp(logits_BTE, axis=-1) ** 2)
    return Load(chosen_E, jnp.zeros(()), loss, z, jnp.sqrt(mean(jnp.mean(logits_BTE**2, axis=-1))))
