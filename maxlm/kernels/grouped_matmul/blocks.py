"""The grouped product in plain JAX: blocks of rows, each with a gathered copy of its group's matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 64  # rows: enough for a CPU's matrix product, little to pad


@jax.custom_vjp
def blocks_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`grouped_matmul`; R and the sizes are multiples of BLOCK."""
    assert x_RD.shape[0] % BLOCK == 0, x_RD.shape
    group_b, held_b = _groups(x_RD, sizes_E)
    out_bSF = jnp.einsum("bsd,bdf->bsf", _cut(x_RD), w_EDF[group_b])
    return jnp.where(held_b[:, None, None], out_bSF, 0).reshape(x_RD.shape[0], -1)


def _backward(kept, g_RF):
    x_RD, w_EDF, sizes_E = kept
    group_b, held_b = _groups(x_RD, sizes_E)
    x_bSD, g_bSF = (jnp.where(held_b[:, None, None], _cut(rows), 0) for rows in (x_RD, g_RF))
    dx_RD = jnp.einsum("bsf,bdf->bsd", g_bSF, w_EDF[group_b]).reshape(x_RD.shape)
    one_Eb = group_b[None] == jnp.arange(w_EDF.shape[0])[:, None]
    dw_bDF = jnp.einsum("bsd,bsf->bdf", x_bSD, g_bSF, preferred_element_type=jnp.float32)
    dw_EDF = jnp.einsum("eb,bdf->edf", one_Eb.astype(jnp.float32), dw_bDF, precision=jax.lax.Precision.HIGHEST)
    return dx_RD, dw_EDF.astype(w_EDF.dtype), None


blocks_matmul.defvjp(lambda x, w, sizes: (blocks_matmul(x, w, sizes), (x, w, sizes)), _backward)


def _cut(rows: jax.Array) -> jax.Array:
    return rows.reshape(-1, BLOCK, rows.shape[-1])


def _groups(x_RD: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The group of each block, and whether it has one."""
    first_b = jnp.arange(x_RD.shape[0] // BLOCK, dtype=jnp.int32) * BLOCK
    group_b = jnp.sum(first_b[:, None] >= jnp.cumsum(sizes_E)[None], axis=1)
    held_b = group_b < sizes_E.size
    return jnp.where(held_b, group_b, 0), held_b
