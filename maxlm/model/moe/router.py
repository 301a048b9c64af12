"""Which experts a token goes to, and with what weights. Everything here is float32.

Softmax top-k as in Mixtral, OLMoE and Qwen3 (weights normalised over the chosen or not); sigmoid scores with a bias
that only selects, and selection within groups of experts, as in DeepSeek-V3 (arXiv:2412.19437, equations 12 to 16).

Dims: N tokens, E experts, K choices a token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxlm.config import ModelConfig


class Choice(NamedTuple):
    """Each token's experts, int32 [N, K], their weights, float32 [N, K], and all experts' scores, [N, E]."""

    expert_NK: jax.Array
    weight_NK: jax.Array
    score_NE: jax.Array


def router_logits(x_ND: jax.Array, w_DE: jax.Array) -> jax.Array:
    """x w, float32 [N, E], to float32's rounding. w: float32.

    A bfloat16 x multiplies w as three bfloat16 matrices that add up to it: Hopper's units for bfloat16 then do what
    float32 products of full precision do not get from them (0.25 and, backward, 0.50 ms for 32768 x 2048 by 64).
    """
    if x_ND.dtype == jnp.bfloat16:
        return _bfloat16_logits(x_ND, w_DE)
    return jnp.einsum("nd,de->ne", x_ND.astype(jnp.float32), w_DE, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _bfloat16_logits(x_ND, w_DE):
    return _sum_of_parts(jnp.dot(x_ND, jnp.concatenate(_parts(w_DE), axis=1), preferred_element_type=jnp.float32))


def _logits_backward(kept, g_NE):
    """The gradient to w as exact as the logits; that to x lacks what its rounding to bfloat16 hides."""
    x_ND, w_DE = kept
    g_parts, (w1_DE, w2_DE, _) = _parts(g_NE), _parts(w_DE)
    dw_DE = _sum_of_parts(jnp.einsum("nd,ne->de", x_ND, jnp.concatenate(g_parts, axis=1),
                                     preferred_element_type=jnp.float32))
    g_NE3, w_DE3 = (jnp.concatenate(parts, axis=1)
                    for parts in ((g_parts[0], g_parts[1], g_parts[0]), (w1_DE, w1_DE, w2_DE)))
    dx_ND = jnp.einsum("ne,de->nd", g_NE3, w_DE3, preferred_element_type=jnp.float32)
    return dx_ND.astype(x_ND.dtype), dw_DE


_bfloat16_logits.defvjp(lambda x_ND, w_DE: (_bfloat16_logits(x_ND, w_DE), (x_ND, w_DE)), _logits_backward)


def _parts(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three bfloat16 arrays whose sum is `a`, float32, the largest first. `reduce_precision`: compilers drop a
    conversion to bfloat16 that is undone."""
    parts = []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7))
        a = a - parts[-1]
    return tuple(part.astype(jnp.bfloat16) for part in parts)


def _sum_of_parts(a: jax.Array) -> jax.Array:
    """Of the last dim's three thirds, the smallest first."""
    largest, middle, smallest = jnp.split(a, 3, axis=-1)
    return smallest + middle + largest


def choose(logits_NE: jax.Array, bias_E: jax.Array | None, model: ModelConfig) -> Choice:
    """The `experts_per_token` best experts of each token. A bias changes who is chosen, never the weights."""
    moe = model.moe
    score_NE = jax.nn.softmax(logits_NE) if moe.scores == "softmax" else jax.nn.sigmoid(logits_NE)
    chosen_by_NE = jax.lax.stop_gradient(score_NE if bias_E is None else score_NE + bias_E[None])
    if moe.num_groups > 1:
        chosen_by_NE = _within_groups(chosen_by_NE, moe.num_groups, moe.groups_per_token)
    _, expert_NK = jax.lax.top_k(chosen_by_NE, model.experts_per_token)
    hit_NKE = expert_NK[:, :, None] == jnp.arange(model.num_experts)[None, None]
    weight_NK = jnp.sum(jnp.where(hit_NKE, score_NE[:, None], 0.0), axis=-1)
    if moe.normalize_weights:
        weight_NK = weight_NK / (jnp.sum(weight_NK, axis=-1, keepdims=True) + 1e-20)
    return Choice(expert_NK.astype(jnp.int32), weight_NK * moe.weight_scale, score_NE)


def _within_groups(score_NE: jax.Array, num_groups: int, kept: int) -> jax.Array:
    """Scores with all groups but each token's `kept` best out of reach. A group counts as its two best experts."""
    N, E = score_NE.shape
    grouped_NGE = score_NE.reshape(N, num_groups, E // num_groups)
    best_NG = jnp.sum(jax.lax.top_k(grouped_NGE, min(2, E // num_groups))[0], axis=-1)
    _, group_NG = jax.lax.top_k(best_NG, kept)
    open_NG = jnp.any(group_NG[:, :, None] == jnp.arange(num_groups)[None, None], axis=1)
    return jnp.where(open_NG[:, :, None], grouped_NGE, -jnp.inf).reshape(N, E)
