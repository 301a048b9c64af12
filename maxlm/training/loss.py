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
    x_BTD = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    cap = model.config.logit_softcap
    return linear_cross_entropy(x_BTD, model.head_weight[...], batch["targets"], z_loss, cap, chunks)
