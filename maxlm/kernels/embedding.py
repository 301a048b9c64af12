"""Looking tokens up in the embedding table, with a gradient that adds up in float32.

Autodiff of a lookup in a bfloat16 table scatters bfloat16 into bfloat16: 4,096 ones on one row add up to 256, so
frequent tokens would lose most of their gradient. Here the backward pass scatters into float32. Both passes are local
to a device (`shard_map`): the table is gathered over `fsdp` in the compute dtype, each `tensor` shard looks up the
tokens of its part of the vocabulary, and the gradient goes straight to the storage layout.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.parallel.sharding import BATCH, STORAGE, has_mesh

_TABLE = P(STORAGE["vocab"], STORAGE["embed"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embedding_lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of the float32 table (in its storage layout) for each token, [B, T, D] in `dtype`."""
    return _forward(table_VD, tokens_BT, dtype)[0]


def _forward(table_VD, tokens_BT, dtype):
    local = functools.partial(_lookup, dtype=dtype)
    kept = (tokens_BT, table_VD.shape)
    if not has_mesh():
        return local(table_VD, tokens_BT, first=0), kept

    def look_up(shard_VD, tokens_BT):
        first = jax.lax.axis_index("tensor") * shard_VD.shape[0]
        return jax.lax.psum(local(_gathered(shard_VD.astype(dtype)), tokens_BT, first=first), "tensor")

    specs = {"in_specs": (_TABLE, P(BATCH, None)), "out_specs": P(BATCH, None, None)}
    return jax.shard_map(look_up, **specs)(table_VD, tokens_BT), kept


def _backward(dtype, kept, dx_BTD):
    tokens_BT, (vocab, width) = kept
    if not has_mesh():
        return _scatter(dx_BTD, tokens_BT, vocab=vocab, first=0), None
    return jax.shard_map(
        functools.partial(_sharded_scatter, vocab=vocab),
        in_specs=(P(BATCH, None, None), P(BATCH, None)), out_specs=_TABLE,
    )(dx_BTD, tokens_BT), None


embedding_lookup.defvjp(_forward, _backward)


def _lookup(table_VD, tokens_BT, *, first, dtype):
    """The rows that this part of the vocabulary holds, from entry `first` on; zeros for other tokens."""
    place_BT = tokens_BT - first
    held_BT = (place_BT >= 0) & (place_BT < table_VD.shape[0])
    return jnp.where(held_BT[..., None], table_VD[jnp.where(held_BT, place_BT, 0)].astype(dtype), 0)


def _scatter(dx_BTD, tokens_BT, *, vocab, first):
    """The gradient of the `vocab` rows from entry `first` on, float32; other tokens are dropped."""
    place_BT = tokens_BT - first
    place_BT = jnp.where(place_BT < 0, vocab, place_BT)  # a negative index would count from the end
    zeros_VD = jnp.zeros((vocab, dx_BTD.shape[-1]), jnp.float32)
    return zeros_VD.at[place_BT].add(dx_BTD.astype(jnp.float32), mode="drop")


def _sharded_scatter(dx_BTD, tokens_BT, *, vocab):
    shard = vocab // jax.lax.axis_size("tensor")
    dw_VD = _scatter(dx_BTD, tokens_BT, vocab=shard, first=jax.lax.axis_index("tensor") * shard)
    if jax.lax.axis_size("fsdp") == 1:
        return jax.lax.psum(dw_VD, BATCH)
    return jax.lax.psum(jax.lax.psum_scatter(dw_VD, "fsdp", scatter_dimension=1, tiled=True), "data")


def _gathered(shard_VD):
    if jax.lax.axis_size("fsdp") == 1:
        return shard_VD
    return jax.lax.all_gather(shard_VD, "fsdp", axis=1, tiled=True)
