"""The training objective: next-token cross-entropy summed over the tokens that have a target."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maxlm.kernels.cross_entropy import CrossEntropy, linear_cross_entropy
from maxlm.model import Transformer

Batch = dict[str, jax.Array]


def token_count(batch: Batch) -> jax.Array:
    """How many positions of the batch have a target, int32."""
    return jnp.sum(batch["targets"] >= 0, dtype=jnp.int32)


def summed_loss(model: Transformer, batch: Batch, *, z_loss: float, chunks: int | str) -> CrossEntropy:
    """Sums over the batch; divide by `token_count` for the mean. Batch arrays are int32 [B, T]."""
    return loss_of_embedded(model, model.embed(batch["tokens"]), batch, z_loss=z_loss, chunks=chunks)[0]


def loss_of_embedded(model: Transformer, x_BTD: jax.Array, batch: Batch, *, z_loss: float,
                     chunks: int | str) -> tuple[CrossEntropy, jax.Array]:
    """`summed_loss` of embedded tokens, and the final hidden states [B, T, D]."""
    x_BTD = model.hidden(x_BTD, batch["positions"], batch["segment_ids"])
    cap = model.config.logit_softcap
    sums = linear_cross_entropy(x_BTD, model.head_weight[...], batch["targets"], z_loss, cap, chunks)
    return sums, x_BTD
