"""What a router did with a batch: how evenly it spread the tokens, and the two losses that keep it in shape."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxlm.config import ModelConfig
from maxlm.model.moe.router import Choice
from maxlm.parallel.sharding import split_over


class Load(NamedTuple):
    """Float32, over all devices and a batch's real tokens (padding left out).

    chosen_E: how many choices went to each expert; dropped: how many, padding's included, found no room. Means:
    balance: E * sum(share of choices * mean score), 1 where both are even. z: square of the logits' logsumexp. logit:
    root mean square of the logits.
    """

    chosen_E: jax.Array
    dropped: jax.Array
    balance: jax.Array
    z: jax.Array
    logit: jax.Array

    def weighted(self, weight: jax.Array) -> Load:
        """What this adds to the load of several batches, of which it has `weight` of the tokens."""
        return self._replace(balance=weight * self.balance, z=weight * self.z, logit=weight * self.logit)


def measure_load(choice: Choice, logits_NE: jax.Array, real_N: jax.Array, dropped: jax.Array, length: int,
                 model: ModelConfig, sharded: bool) -> Load:
    """Sums over this device's tokens, then (sharded) over the mesh. real_N: False for padding; dropped: how many
    choices found no room; length: tokens of a row that are here."""
    total = (lambda a: jax.lax.psum(a, split_over(logits_NE))) if sharded else (lambda a: a)
    whole_rows = (lambda a: jax.lax.psum(a, "context")) if sharded else (lambda a: a)
    E, K = model.num_experts, model.experts_per_token
    hit_NE = jnp.sum(choice.expert_NK[:, :, None] == jnp.arange(E)[None, None], axis=1, dtype=jnp.float32)
    hit_NE = jnp.where(real_N[:, None], hit_NE, 0.0)
    score_NE = jnp.where(real_N[:, None], choice.score_NE / jnp.sum(choice.score_NE, axis=-1, keepdims=True), 0.0)
    count = jnp.maximum(total(jnp.sum(real_N, dtype=jnp.float32)), 1.0)
    chosen_E = total(jnp.sum(hit_NE, axis=0))
    if model.moe.balance_over == "batch":
        balance = E * jnp.sum(chosen_E / (count * K) * total(jnp.sum(score_NE, axis=0)) / count)
    else:  # each row of the batch by itself, weighted by its tokens
        hit_BE, score_BE = (jnp.sum(a.reshape(-1, length, E), axis=1) for a in (hit_NE, score_NE))
        tokens_B = whole_rows(jnp.sum(real_N.reshape(-1, length), axis=1, dtype=jnp.float32))
        share_BE = whole_rows(hit_BE) / jnp.maximum(tokens_B, 1.0)[:, None]
        balance = total(E * jnp.sum(share_BE * score_BE) / K) / count
    square_N = jnp.square(jax.nn.logsumexp(logits_NE, axis=-1))
    scale_N = jnp.mean(jnp.square(logits_NE), axis=-1)
    z, scale = (total(jnp.sum(jnp.where(real_N, a, 0.0))) / count for a in (square_N, scale_N))
    return Load(chosen_E, total(dropped), balance, z, jnp.sqrt(scale))
