"""The decoder: embedding, a loop over stacked layers, final norm, output head.

Layers are stored stacked. With a layer pattern of n kinds, `layers_j` stacks layers j, j+n, j+2n, ...: the loop
runs over repeats of the pattern, and can scan, unroll or partly unroll the same parameters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config import ModelConfig
from maxlm.kernels.embedding import embedding_lookup
from maxlm.model.attention import Cache
from maxlm.model.block import Block
from maxlm.model.norm import RMSNorm
from maxlm.model.parameter import matrix
from maxlm.model.rope import rotation
from maxlm.parallel.sharding import unstack, use

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("attention", "mlp_up"),
}


class Transformer(nnx.Module):
    """tokens [B, T] -> final hidden states [B, T, D]. The head's product is in the loss (kernels/cross_entropy)
    or in `logits`, so that float32 logits of a whole batch never exist."""

    def __init__(self, config: ModelConfig, *, kernel: str, dtype: jnp.dtype, remat: str, unroll: int | str,
                 rngs: nnx.Rngs):
        table = (config.vocab_size, config.hidden_dim)
        self.embedding = matrix(rngs, table, ("vocab", "embed"), config.init_std)
        for j, kind in enumerate(config.layer_pattern):
            keys = jax.random.split(rngs.params(), config.num_layers // len(config.layer_pattern))
            stack = jax.vmap(lambda key, kind=kind: Block(config, kind, kernel, dtype, nnx.Rngs(key)))(keys)
            setattr(self, f"layers_{j}", stack)
        self.final_norm = RMSNorm(config.hidden_dim, config.norm_eps)
        self.head = None if config.tie_embeddings else matrix(rngs, table, ("vocab", "embed"), config.init_std)
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.unroll = unroll

    @property
    def head_weight(self) -> nnx.Param:
        """The output matrix, [V, D]: the embedding where they are tied."""
        return self.embedding if self.head is None else self.head

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        return self.hidden(self.embed(tokens_BT), positions_BT, segment_ids_BT)

    def hidden(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """Final hidden states [B, T, D] of embedded tokens."""
        turn = rotation(self.config.rope, self.config.head_dim, positions_BT)

        def repeat(x_BTD: jax.Array, blocks: tuple[Block, ...]) -> jax.Array:
            for block in blocks:
                x_BTD = block(x_BTD, turn, segment_ids_BT)
            return x_BTD

        if self.remat != "none":
            # A loop keeps forward and backward apart by itself; without one, or in a loop of one turn, the compiler
            # would find the recomputed values in the forward pass and keep those instead.
            scanned = self.unroll != "all" and self.unroll < self.num_repeats
            repeat = jax.checkpoint(repeat, policy=REMAT_POLICIES[self.remat], prevent_cse=not scanned)
        stacks = self.stacks()
        if self.unroll == "all":
            for blocks in _unstacked(stacks):
                x_BTD = repeat(x_BTD, blocks)
        else:
            x_BTD, _ = jax.lax.scan(lambda x, blocks: (repeat(x, blocks), None), x_BTD, stacks, unroll=self.unroll)
        return self.final_norm(x_BTD)

    @property
    def num_repeats(self) -> int:
        return self.config.num_layers // len(self.config.layer_pattern)

    def stacks(self) -> tuple[Block, ...]:
        """The stacked blocks of each place in the layer pattern."""
        return tuple(getattr(self, f"layers_{j}") for j in range(len(self.config.layer_pattern)))

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        return embedding_lookup(self.embedding[...], tokens_BT, self.dtype)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of hidden states: for generation, where T is 1."""
        logits = jnp.einsum("BTD,VD->BTV", x_BTD, use(self.head_weight, self.dtype), preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def decode(self, tokens_BT: jax.Array, cache: tuple[Cache, ...], start: jax.Array) -> tuple[jax.Array, Any]:
        """Hidden states [B, T, D] of new tokens at positions start.., and the caches with them in place."""
        positions_BT = jnp.broadcast_to(start + jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
        turn = rotation(self.config.rope, self.config.head_dim, positions_BT)

        def repeat(x_BTD: jax.Array, blocks_and_caches: Any) -> tuple[jax.Array, Any]:
            longer = []
            for block, layer_cache in zip(*blocks_and_caches, strict=True):
                x_BTD, layer_cache = block.decode(x_BTD, turn, layer_cache, start)
                longer.append(layer_cache)
            return x_BTD, tuple(longer)

        x_BTD, cache = jax.lax.scan(repeat, self.embed(tokens_BT), (self.stacks(), cache))
        return self.final_norm(x_BTD), cache

    def empty_cache(self, batch: int, length: int) -> tuple[Cache, ...]:
        """Zeroed caches for `length` tokens: one a place in the layer pattern, each stacked over the repeats."""
        shape = (self.num_repeats, batch, length, self.config.num_kv_heads, self.config.head_dim)
        return tuple(
            Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in self.config.layer_pattern
        )


def _unstacked(stacks: tuple[Block, ...]) -> list[tuple[Block, ...]]:
    """The blocks of each repeat out of the stacks."""
    leaves, structure = jax.tree.flatten(stacks)
    return [structure.unflatten(repeat) for repeat in zip(*map(unstack, leaves), strict=True)]


def make_transformer(config: ModelConfig, key: jax.Array, *, kernel: str = "reference",
                     dtype: jnp.dtype = jnp.float32, remat: str = "none", unroll: int | str = 1) -> Transformer:
    """A freshly initialised decoder. Equal keys give equal bits on any mesh."""
    return Transformer(config, kernel=kernel, dtype=dtype, remat=remat, unroll=unroll, rngs=nnx.Rngs(params=key))
