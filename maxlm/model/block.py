"""One layer: attention and feed-forward sublayers on a residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config import ModelConfig
from maxlm.model.attention import Cache, SelfAttention
from maxlm.model.mlp import MLP
from maxlm.model.moe.layer import MoE
from maxlm.model.moe.load import Load
from maxlm.model.norm import RMSNorm
from maxlm.model.parametrization import multipliers
from maxlm.model.rope import Rotation
from maxlm.numerics import Numerics


class Kernels(NamedTuple):
    """What a model computes with: names from the choices of kernels/, and of model/moe/exchange.py."""

    attention: str = "reference"
    grouped_matmul: str = "blocks"
    exchange: str = "all_to_all"
    across: str = "ring"  # attention, where mesh.context splits the rows


PLAIN = Kernels()  # on any platform


class Block(nnx.Module):
    """x + sublayer(norm(x)), twice ('pre'); x + norm(sublayer(x)) ('post'); or a norm on either side ('both').

    sparse: the feed-forward sublayer is a mixture of experts, and the layer also returns what its router did.
    """

    def __init__(self, config: ModelConfig, kind: str, sparse: bool, kernels: Kernels, rngs: nnx.Rngs):
        window = config.sliding_window if kind == "local" else None
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        norm = lambda wanted: RMSNorm(config.hidden_dim, config.norm_eps) if wanted else None  # noqa: E731
        self.attention_norm, self.attention_post_norm = norm(before), norm(after)
        self.attention = SelfAttention(config, window, kernels.attention, kernels.across, rngs)
        self.mlp_norm, self.mlp_post_norm = norm(before), norm(after)
        if sparse:
            self.mlp = MoE(config, kernels.grouped_matmul, kernels.exchange, rngs)
        else:
            self.mlp = MLP(config, config.mlp_dim, rngs)
        self.multiplier = multipliers(config).sublayer

    def __call__(self, x_BTD: jax.Array, turn: Rotation, segment_ids_BT: jax.Array, numerics: Numerics,
                 key: jax.Array | None = None) -> tuple[jax.Array, Load | None]:
        """key: for what is random in training (the router's jitter)."""
        attend = lambda h: self.attention(h, turn, segment_ids_BT, numerics)  # noqa: E731
        return self._layer(x_BTD, attend, segment_ids_BT, numerics, key)

    def decode(self, x_BTD: jax.Array, turn: Rotation, cache: Cache, start: jax.Array,
               numerics: Numerics) -> tuple[jax.Array, Cache]:
        """The layer on new tokens alone, with the cache of the earlier ones; returns the longer cache."""
        longer = cache

        def attend(h_BTD: jax.Array) -> jax.Array:
            nonlocal longer
            out_BTD, longer = self.attention.decode(h_BTD, turn, cache, start, numerics)
            return out_BTD

        return self._layer(x_BTD, attend, jnp.ones(x_BTD.shape[:2], jnp.int32), numerics)[0], longer

    def _layer(self, x_BTD: jax.Array, attend: Callable[[jax.Array], jax.Array], segment_ids_BT: jax.Array,
               numerics: Numerics, key: jax.Array | None = None) -> tuple[jax.Array, Load | None]:
        x_BTD = x_BTD + self._scaled(_normed(self.attention_post_norm, attend(_normed(self.attention_norm, x_BTD))))
        h_BTD, load = _normed(self.mlp_norm, x_BTD), None
        if isinstance(self.mlp, MoE):
            h_BTD, load = self.mlp(h_BTD, segment_ids_BT, numerics, key)
        else:
            h_BTD = self.mlp(h_BTD, numerics)
        return x_BTD + self._scaled(_normed(self.mlp_post_norm, h_BTD)), load

    def _scaled(self, out_BTD: jax.Array) -> jax.Array:
        return out_BTD if self.multiplier == 1.0 else self.multiplier * out_BTD


def _normed(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)
