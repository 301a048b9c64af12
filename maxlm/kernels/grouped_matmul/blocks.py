"""The grouped product in plain JAX: one block of rows after the other, each with its group's matrix.

On a CPU a block's product takes the time that its share of one large product would; copies of the matrices beside each
other and one batched product took up to three times as long (docs/LOG.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 64  # rows: enough for a CPU's matrix product, little to pad


@jax.custom_vjp
def blocks_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`grouped_matmul`; R and the sizes are multiples of BLOCK."""
    return blocks_product("sd,df->sf", x_RD, w_EDF, sizes_E)


def _backward(kept, g_RF):
    x_RD, w_EDF, sizes_E = kept
    dx_RD = blocks_product("sf,df->sd", g_RF, w_EDF, sizes_E)
    return dx_RD, blocks_weights(x_RD, g_RF, sizes_E).astype(w_EDF.dtype), None


blocks_matmul.defvjp(lambda x, w, sizes: (blocks_matmul(x, w, sizes), (x, w, sizes)), _backward)


def blocks_product(subscripts: str, rows: jax.Array, matrices: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`subscripts` of each row (with s for a block's) and its group's matrix, in the rows' dtype, accumulated in
    float32; 0 behind the last group."""
    blocks, group_b, held_b = _cut(rows, sizes_E)

    def one(block):
        rows_s, group, held = block
        out_s = jnp.einsum(subscripts, rows_s, matrices[group], preferred_element_type=jnp.float32)
        return jnp.where(held, out_s, 0).astype(rows.dtype)

    out = jax.lax.map(one, (blocks, group_b, held_b))
    return out.reshape(rows.shape[0], -1)


def blocks_weights(x_RD: jax.Array, g_RF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """float32 [E, D, F]: the sum of x[r] g[r]^T over each group's rows."""

    def one(total_EDF, block):
        x_sD, g_sF, group, held = block
        part_DF = jnp.einsum("sd,sf->df", x_sD, g_sF, preferred_element_type=jnp.float32)
        return total_EDF.at[group].add(jnp.where(held, part_DF, 0)), None

    x_bsD, group_b, held_b = _cut(x_RD, sizes_E)
    empty_EDF = jax.lax.full_like(x_RD, 0, jnp.float32, (sizes_E.size, x_RD.shape[1], g_RF.shape[1]))
    return jax.lax.scan(one, empty_EDF, (x_bsD, _cut(g_RF, sizes_E)[0], group_b, held_b))[0]


def _cut(rows: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The blocks, the group of each, and whether it has one."""
    assert rows.shape[0] % BLOCK == 0, rows.shape
    first_b = jnp.arange(rows.shape[0] // BLOCK, dtype=jnp.int32) * BLOCK
    group_b = jnp.sum(first_b[:, None] >= jnp.cumsum(sizes_E)[None], axis=1)
    held_b = group_b < sizes_E.size
    return rows.reshape(-1, BLOCK, rows.shape[-1]), jnp.where(held_b, group_b, 0), held_b
