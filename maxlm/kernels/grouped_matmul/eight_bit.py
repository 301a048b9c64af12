"""The two grouped products that experts in 8-bit floats are made of, with a scale for each group.

Both contract along the last dim of both operands, the form that Hopper's 8-bit units take. 'blocks' and 'ragged_dot'
multiply the values as bfloat16, which holds them exactly.

Dims: R rows, in order of their group, E groups, K contracted; D, F produced.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from maxlm.kernels.grouped_matmul.blocks import blocks_product, blocks_weights

_BY_ROWS = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [1], [])


def grouped_product_8bit(pairs: Sequence[tuple[jax.Array, jax.Array]], sizes_E: jax.Array, scale_E: jax.Array,
                         implementation: str) -> jax.Array:
    """bfloat16 [R, F]: the sum over pairs (a [R, K], b [E, F, K]) of each row of a with the matrix of its group,
    accumulated in float32, times the group's scale; 0 behind the last group, where a is 0.

    sizes_E: int32, multiples of GROUP_MULTIPLE[implementation].
    """
    if implementation == "mosaic_gpu":
        from maxlm.kernels.grouped_matmul.mosaic_gpu import product  # Pallas is slow to import

        return product(tuple(pairs), sizes_E, scale_E, b_last=True)
    out_RF = sum(_product(a, b, sizes_E, implementation).astype(jnp.float32) for a, b in pairs)
    group_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(out_RF.shape[0], dtype=jnp.int32), side="right")
    return (out_RF * scale_E.at[group_R].get(mode="clip")[:, None]).astype(jnp.bfloat16)


def _product(a_RK, b_EFK, sizes_E, implementation):
    if implementation == "mosaic_tpu":
        from maxlm.kernels.grouped_matmul.mosaic_tpu import tpu_product

        return tpu_product(a_RK, b_EFK, sizes_E, jnp.dtype("bfloat16"), turned=True)
    a_RK, b_EFK = a_RK.astype(jnp.bfloat16), b_EFK.astype(jnp.bfloat16)
    if implementation == "ragged_dot":
        out_RF = jax.lax.ragged_dot_general(a_RK, b_EFK, sizes_E, _BY_ROWS)
        return jnp.where((jnp.arange(a_RK.shape[0]) < jnp.sum(sizes_E))[:, None], out_RF, 0)
    assert implementation == "blocks", implementation
    return blocks_product("sk,fk->sf", a_RK, b_EFK, sizes_E)


def grouped_weights_8bit(a_DR: jax.Array, b_FR: jax.Array, sizes_E: jax.Array, scale: jax.Array,
                         implementation: str) -> jax.Array:
    """[E, D, F], float32 or bfloat16: for each group the sum over its rows r of a[d, r] * b[f, r], times `scale`, a
    scalar; 0 for empty groups."""
    if implementation == "mosaic_gpu":
        from maxlm.kernels.grouped_matmul.mosaic_gpu import weights_gradient  # Pallas is slow to import

        return weights_gradient(a_DR, b_FR, sizes_E, scale, rows_last=True)
    if implementation == "mosaic_tpu":
        from maxlm.kernels.grouped_matmul.mosaic_tpu import tpu_weights

        return tpu_weights(a_DR, b_FR, sizes_E, jnp.dtype("float32"), rows_last=True) * scale
    a_DR, b_FR = a_DR.astype(jnp.bfloat16), b_FR.astype(jnp.bfloat16)
    if implementation == "ragged_dot":
        dw = jax.lax.ragged_dot_general(a_DR, b_FR, sizes_E, _OVER_ROWS, preferred_element_type=jnp.float32)
    else:
        assert implementation == "blocks", implementation
        dw = blocks_weights(a_DR.T, b_FR.T, sizes_E)
    return dw * scale
