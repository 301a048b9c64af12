"""The self-attention sublayer: grouped queries (arXiv:2305.13245), rotary positions, optional QK-norm."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.config import ModelConfig
from maxlm.kernels.attention import attention
from maxlm.model.norm import RMSNorm
from maxlm.model.parameter import matrix
from maxlm.model.parametrization import multipliers
from maxlm.model.rope import Rotation, rotate
from maxlm.numerics import Numerics
from maxlm.parallel.sharding import constrain


class Cache(NamedTuple):
    """Keys and values of the tokens so far, [B, S, G, K] each, for generation."""

    k: jax.Array
    v: jax.Array


class SelfAttention(nnx.Module):
    """x [B, T, D] -> [B, T, D]; causal, within a document, within `window` tokens where one is given."""

    def __init__(self, config: ModelConfig, window: int | None, kernel: str, across: str, rngs: nnx.Rngs):
        width, kv_heads, head = config.hidden_dim, config.num_kv_heads, config.head_dim
        self.group = config.num_heads // kv_heads
        scale = multipliers(config)
        # One matrix makes each group's queries, then its key and its value: query head h reads group h // R.
        self.qkv = matrix(
            rngs, (width, kv_heads, self.group + 2, head), ("embed", "kv_heads", None, None),
            config.init_std / scale.matrix_init, contracted=(0,), produced=(1, 3),
        )
        self.out = matrix(
            rngs, (config.num_heads, head, width), ("heads", None, "embed"), config.init_std / scale.residual_init,
            contracted=(0, 1), produced=(2,),
        )
        self.q_norm = RMSNorm(head, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head, config.norm_eps) if config.qk_norm else None
        self.softcap = config.attention_softcap
        self.window = window
        self.kernel, self.across = kernel, across

    def __call__(self, x_BTD: jax.Array, turn: Rotation, segment_ids_BT: jax.Array, numerics: Numerics) -> jax.Array:
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, turn, numerics)
        out_BTHK = attention(
            q_BTHK, k_BTGK, v_BTGK, segment_ids_BT=segment_ids_BT, window=self.window, softcap=self.softcap,
            implementation=self.kernel, across=self.across,
        )
        return self.merge(out_BTHK, numerics)

    def project(self, x_BTD: jax.Array, turn: Rotation, numerics: Numerics) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B, T, H, K] and keys [B, T, G, K], and values [B, T, G, K]."""
        group, (batch, length) = self.group, x_BTD.shape[:2]
        dims = ("batch", "length", "kv_heads", None, None)
        qkv_BTGRK = checkpoint_name(numerics.attention.einsum("BTD,DGRK->BTGRK", x_BTD, self.qkv, dims), "product")
        kv_heads, head = qkv_BTGRK.shape[2], qkv_BTGRK.shape[4]
        q_BTGRK, k_BTG1K, v_BTG1K = jnp.split(qkv_BTGRK, [group, group + 1], axis=3)
        q_BTHK = constrain(q_BTGRK.reshape(batch, length, kv_heads * group, head), ("batch", "length", "heads", None))
        k_BTGK, v_BTGK = jnp.squeeze(k_BTG1K, axis=3), jnp.squeeze(v_BTG1K, axis=3)
        if self.q_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        return rotate(q_BTHK, turn), rotate(k_BTGK, turn), v_BTGK

    def merge(self, out_BTHK: jax.Array, numerics: Numerics) -> jax.Array:
        out_BTD = numerics.attention.einsum("BTHK,HKD->BTD", out_BTHK, self.out, ("batch", "stream", None))
        return checkpoint_name(out_BTD, "product")

    def decode(self, x_BTD: jax.Array, turn: Rotation, cache: Cache, start: jax.Array,
               numerics: Numerics) -> tuple[jax.Array, Cache]:
        """Attends from T new tokens at positions start.. to the cache and themselves; returns the longer cache."""
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, turn, numerics)
        cache = Cache(
            jax.lax.dynamic_update_slice_in_dim(cache.k, k_BTGK, start, axis=1),
            jax.lax.dynamic_update_slice_in_dim(cache.v, v_BTGK, start, axis=1),
        )
        batch, length, heads, head = q_BTHK.shape
        q_BTGRK = q_BTHK.reshape(batch, length, heads // self.group, self.group, head)
        scores = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, cache.k, preferred_element_type=jnp.float32) / math.sqrt(head)
        if self.softcap:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        query_T, key_S = start + jnp.arange(length)[:, None], jnp.arange(cache.k.shape[1])[None, :]
        visible_TS = key_S <= query_T
        if self.window is not None:
            visible_TS &= key_S > query_T - self.window
        weights = jax.nn.softmax(jnp.where(visible_TS[None, None, None], scores, -jnp.inf), axis=-1)
        out = jnp.einsum("BGRTS,BSGK->BTGRK", weights.astype(numerics.dtype), cache.v)
        return self.merge(out.reshape(batch, length, heads, head), numerics), cache
