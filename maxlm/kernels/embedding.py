"""Looking tokens up in the embedding table, with a gradient that adds up in float32.

Autodiff of a lookup in a bfloat16 table scatters bfloat16 into bfloat16: 4,096 ones on one row add up to 256, so
frequent tokens would lose most of their gradient. And a GPU's scatter adds in the order its threads happen to come, so
no two runs agree. Here the rows are sorted by token and added up in float32 in an order that depends on the tokens
alone. Both passes are local to a device (`shard_map`): the table is gathered over `fsdp` in the compute dtype, each
`tensor` shard looks up the tokens of its part of the vocabulary, the sum goes straight to the layout of the residual
stream, and the gradient straight to the storage layout.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.parallel.sharding import (
    BATCH,
    REPLICAS,
    SHARD,
    STORAGE,
    STREAM,
    TOKENS,
    gathered_tokens,
    has_mesh,
    scattered_tokens,
    shard_count,
)

_TABLE = P(STORAGE["vocab"], STORAGE["embed"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embedding_lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of the float32 table (in its storage layout) for each token, [B, T, D] in `dtype`, laid out as
    the residual stream."""
    return _forward(table_VD, tokens_BT, dtype)[0]


def _forward(table_VD, tokens_BT, dtype):
    local = functools.partial(_lookup, dtype=dtype)
    kept = (tokens_BT, table_VD.shape)
    if not has_mesh():
        return local(table_VD, tokens_BT, first=0), kept

    def look_up(shard_VD, tokens_BT):
        first = jax.lax.axis_index("tensor") * shard_VD.shape[0]
        return scattered_tokens(local(_gathered(shard_VD.astype(dtype)), tokens_BT, first=first))

    specs = {"in_specs": (_TABLE, P(BATCH, "context")), "out_specs": P(BATCH, STREAM, None)}
    return jax.shard_map(look_up, **specs)(table_VD, tokens_BT), kept


def _backward(dtype, kept, dx_BTD):
    tokens_BT, (vocab, width) = kept
    if not has_mesh():
        return _scatter(dx_BTD, tokens_BT, vocab=vocab, first=0), None
    return jax.shard_map(
        functools.partial(_sharded_scatter, vocab=vocab),
        in_specs=(P(BATCH, STREAM, None), P(BATCH, "context")), out_specs=_TABLE,
    )(dx_BTD, tokens_BT), None


embedding_lookup.defvjp(_forward, _backward)


def _lookup(table_VD, tokens_BT, *, first, dtype):
    """The rows that this part of the vocabulary holds, from entry `first` on; zeros for other tokens."""
    place_BT = tokens_BT - first
    held_BT = (place_BT >= 0) & (place_BT < table_VD.shape[0])
    return jnp.where(held_BT[..., None], table_VD[jnp.where(held_BT, place_BT, 0)].astype(dtype), 0)


def _scatter(dx_BTD, tokens_BT, *, vocab, first):
    """The gradient of the `vocab` rows from entry `first` on, float32; other tokens are dropped."""
    place_N = tokens_BT.reshape(-1) - first
    held_N = (place_N >= 0) & (place_N < vocab)
    return sum_by_row(dx_BTD.reshape(-1, dx_BTD.shape[-1]), jnp.where(held_N, place_N, vocab), vocab)


def sum_by_row(values_ND: jax.Array, rows_N: jax.Array, num_rows: int) -> jax.Array:
    """out[r] = sum of the values whose row is r, [num_rows, D] float32; rows from `num_rows` on are dropped.

    Sorted by row, the values are cut into blocks of up to 128. Within a block a product with a matrix of 0 and 1
    makes the running sum of each row; the blocks' last sums are scanned to carry rows over block borders; the last
    running sum of each row is its total. Nothing is added concurrently, so the bits are the same every time.
    """
    order_N = jnp.argsort(rows_N)
    block = math.gcd(values_ND.shape[0], _BLOCK)
    rows_bS = rows_N[order_N].reshape(-1, block)
    values_bSD = values_ND[order_N].reshape(-1, block, values_ND.shape[1])
    same_bSS = (rows_bS[:, :, None] == rows_bS[:, None, :]) & jnp.tri(block, dtype=bool)[None]
    sums_bSD = jnp.einsum("bst,btd->bsd", same_bSS.astype(values_ND.dtype), values_bSD,
                          precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    last_b = rows_bS[:, -1]
    before_b = jnp.concatenate([jnp.full(1, -1, last_b.dtype), last_b[:-1]])  # the last row of the block before
    carries_b = (last_b == before_b)  # so is the whole block, which is sorted
    _, ending_bD = jax.lax.associative_scan(_carry, (carries_b[:, None], sums_bSD[:, -1]))
    carried_bD = jnp.concatenate([jnp.zeros_like(ending_bD[:1]), ending_bD[:-1]])
    totals_bSD = sums_bSD + jnp.where((rows_bS == before_b[:, None])[..., None], carried_bD[:, None], 0)

    rows_N = rows_bS.reshape(-1)
    wanted_R = jnp.arange(num_rows, dtype=rows_N.dtype)
    final_R = jnp.searchsorted(rows_N, wanted_R, side="right") - 1  # where each row's total stands, if it has one
    totals_RD = totals_bSD.reshape(values_ND.shape)[final_R]
    return jnp.where((rows_N[final_R] == wanted_R)[:, None], totals_RD, 0)


_BLOCK = 128


def _carry(left, right):
    """Two neighbouring runs of blocks as (whether all carry what comes in, the sum that ends there)."""
    (left_carries, left_sum), (right_carries, right_sum) = left, right
    return left_carries & right_carries, right_sum + jnp.where(right_carries, left_sum, 0)


def _sharded_scatter(dx_BTD, tokens_BT, *, vocab):
    shard = vocab // jax.lax.axis_size("tensor")
    dw_VD = _scatter(gathered_tokens(dx_BTD), tokens_BT, vocab=shard, first=jax.lax.axis_index("tensor") * shard)
    if shard_count() == 1:
        return jax.lax.psum(dw_VD, TOKENS)
    return jax.lax.psum(jax.lax.psum_scatter(dw_VD, SHARD, scatter_dimension=1, tiled=True), REPLICAS)


def _gathered(shard_VD):
    if shard_count() == 1:
        return shard_VD
    return jax.lax.all_gather(shard_VD, SHARD, axis=1, tiled=True)
