"""The training objective: next-token cross-entropy summed over the tokens that have a target."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maxlm.config import MoEConfig
from maxlm.kernels.cross_entropy import CrossEntropy, linear_cross_entropy
from maxlm.model import Transformer
from maxlm.model.moe.load import Load
from maxlm.parallel.context import balanced_order

Batch = dict[str, jax.Array]


def token_count(batch: Batch) -> jax.Array:
    """How many positions of the batch have a target, int32."""
    return jnp.sum(batch["targets"] >= 0, dtype=jnp.int32)


def real_tokens(batch: Batch) -> jax.Array:
    """How many positions of the batch are no padding, int32: what a Load is a mean over."""
    return jnp.sum(batch["segment_ids"] > 0, dtype=jnp.int32)


def summed_loss(model: Transformer, batch: Batch, *, z_loss: float, chunks: int | str,
                key: jax.Array | None = None) -> tuple[CrossEntropy, Load | None]:
    """Sums over the batch (divide by `token_count` for the mean), and what the routers did. Batch: int32 [B, T].

    key: for what is random in training.
    """
    batch = balanced_order(batch)
    x_BTD = model.embed(batch["tokens"])
    sums, load, _ = loss_of_embedded(model, x_BTD, batch, z_loss=z_loss, chunks=chunks, key=key)
    return sums, load


def loss_of_embedded(model: Transformer, x_BTD: jax.Array, batch: Batch, *, z_loss: float, chunks: int | str,
                     key: jax.Array | None = None) -> tuple[CrossEntropy, Load | None, jax.Array]:
    """`summed_loss` of embedded tokens, and the final hidden states [B, T, D], all in `balanced_order`."""
    x_BTD, load = model.hidden(x_BTD, batch["positions"], batch["segment_ids"], key)
    cap = model.config.logit_softcap
    sums = linear_cross_entropy(x_BTD, model.head_weight[...], batch["targets"], z_loss, cap, chunks)
    return sums, load, x_BTD


def router_loss(load: Load | None, moe: MoEConfig) -> jax.Array | float:
    """The routers' own losses with their coefficients, a mean over layers and real tokens; 0 without routers."""
    if load is None:
        return 0.0
    return moe.balance_loss * jnp.mean(load.balance) + moe.router_z_loss * jnp.mean(load.z)
