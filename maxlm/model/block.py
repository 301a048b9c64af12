"""One layer: attention and feed-forward sublayers on a residual stream."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config import ModelConfig
from maxlm.model.attention import Cache, SelfAttention
from maxlm.model.mlp import MLP
from maxlm.model.norm import RMSNorm
from maxlm.model.rope import Rotation


class Block(nnx.Module):
    """x + sublayer(norm(x)), twice ('pre'); x + norm(sublayer(x)) ('post'); or a norm on either side ('both')."""

    def __init__(self, config: ModelConfig, kind: str, kernel: str, dtype: jnp.dtype, rngs: nnx.Rngs):
        window = config.sliding_window if kind == "local" else None
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        norm = lambda wanted: RMSNorm(config.hidden_dim, config.norm_eps) if wanted else None  # noqa: E731
        self.attention_norm, self.attention_post_norm = norm(before), norm(after)
        self.attention = SelfAttention(config, window, kernel, dtype, rngs)
        self.mlp_norm, self.mlp_post_norm = norm(before), norm(after)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(self, x_BTD: jax.Array, turn: Rotation, segment_ids_BT: jax.Array) -> jax.Array:
        return self._layer(x_BTD, lambda h: self.attention(h, turn, segment_ids_BT))

    def decode(self, x_BTD: jax.Array, turn: Rotation, cache: Cache, start: jax.Array) -> tuple[jax.Array, Cache]:
        """The layer on new tokens alone, with the cache of the earlier ones; returns the longer cache."""
        longer = cache

        def attend(h_BTD: jax.Array) -> jax.Array:
            nonlocal longer
            out_BTD, longer = self.attention.decode(h_BTD, turn, cache, start)
            return out_BTD

        return self._layer(x_BTD, attend), longer

    def _layer(self, x_BTD: jax.Array, attend: Callable[[jax.Array], jax.Array]) -> jax.Array:
        x_BTD = x_BTD + _normed(self.attention_post_norm, attend(_normed(self.attention_norm, x_BTD)))
        return x_BTD + _normed(self.mlp_post_norm, self.mlp(_normed(self.mlp_norm, x_BTD)))


def _normed(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)
