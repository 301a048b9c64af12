"""The two grouped products that experts in 8-bit floats are made of, without scales.

Both contract along the last dim of both operands, the form that Hopper's 8-bit units take. 'blocks' and 'ragged_dot'
multiply the values as bfloat16, which holds them exactly.

Dims: R rows, in order of their group, E groups, K contracted; D, F produced.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maxlm.kernels.grouped_matmul.blocks import blocks_product, blocks_weights

_BY_ROWS = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [1], [])


def grouped_product_8bit(a_RK: jax.Array, b_EFK: jax.Array, sizes_E: jax.Array, implementation: str) -> jax.Array:
    """bfloat16 [R, F]: each row with the matrix of its group, accumulated in float32; 0 behind the last group.

    sizes_E: int32, multiples of GROUP_MULTIPLE[implementation].
    """
    if implementation == "mosaic_gpu":
        from maxlm.kernels.grouped_matmul.mosaic_gpu_8bit import product_8bit  # Pallas is slow to import

        return product_8bit(a_RK, b_EFK, sizes_E)
    a_RK, b_EFK = a_RK.astype(jnp.bfloat16), b_EFK.astype(jnp.bfloat16)
    if implementation == "ragged_dot":
        out_RF = jax.lax.ragged_dot_general(a_RK, b_EFK, sizes_E, _BY_ROWS)
        return jnp.where((jnp.arange(a_RK.shape[0]) < jnp.sum(sizes_E))[:, None], out_RF, 0)
    assert implementation == "blocks", implementation
    return blocks_product("sk,fk->sf", a_RK, b_EFK, sizes_E)


def grouped_weights_8bit(a_DR: jax.Array, b_FR: jax.Array, sizes_E: jax.Array, implementation: str) -> jax.Array:
    """float32 [E, D, F]: for each group the sum over its rows r of a[d, r] * b[f, r]; 0 for empty groups."""
    if implementation == "mosaic_gpu":
        from maxlm.kernels.grouped_matmul.mosaic_gpu_8bit import weights_8bit  # Pallas is slow to import

        return weights_8bit(a_DR, b_FR, sizes_E)
    a_DR, b_FR = a_DR.astype(jnp.bfloat16), b_FR.astype(jnp.bfloat16)
    if implementation == "ragged_dot":
        return jax.lax.ragged_dot_general(a_DR, b_FR, sizes_E, _OVER_ROWS, preferred_element_type=jnp.float32)
    assert implementation == "blocks", implementation
    return blocks_weights(a_DR.T, b_FR.T, sizes_E)
