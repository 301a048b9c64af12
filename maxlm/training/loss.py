"""The training objective: next-token cross-entropy summed over the tokens that have a target."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maxlm.kernels.cross_entropy import CrossEntropy, linear_cross_entropy
from maxlm.model import Transformer
from maxlm.model.moe.load import Load

Batch = dict[str, jax.Array]


def token_count(batch: Batch) -> jax.Array:
    """How many positions of the batch have a target, int32."""
    return jnp.sum(batch["targets"] >= 0, dtype=jnp.int32)


def summed_loss(model: Transformer, batch: Batch, *, z_loss: float, chunks: int | str,
                key: jax.Array | None = None) -> tuple[CrossEntropy, Load | None]:
    """Sums over the batch (divide by `token_count` for the mean), and what the routers did. Batch: int32 [B, T].

    The routers' losses are means over tokens; here they count as many times as there are tokens. key: for what is
    random in training.
    """
    x_BTD = model.embed(batch["tokens"])
    sums, load, _ = loss_of_embedded(model, x_BTD, batch, z_loss=z_loss, chunks=chunks, key=key)
    return sums, load


def loss_of_embedded(model: Transformer, x_BTD: jax.Array, batch: Batch, *, z_loss: float, chunks: int | str,
                     key: jax.Array | None = None) -> tuple[CrossEntropy, Load | None, jax.Array]:
    """`summed_loss` of embedded tokens, and the final hidden states [B, T, D]."""
    x_BTD, load = model.hidden(x_BTD, batch["positions"], batch["segment_ids"], key)
    cap, moe = model.config.logit_softcap, model.config.moe
    sums = linear_cross_entropy(x_BTD, model.head_weight[...], batch["targets"], z_loss, cap, chunks)
    if load is not None:
        routers = moe.balance_loss * jnp.mean(load.balance) + moe.router_z_loss * jnp.mean(load.z)
        sums = sums._replace(loss=sums.loss + routers * token_count(batch))
    return sums, load, x_BTD
