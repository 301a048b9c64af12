"""Products of groups of rows, each with a matrix of its own: the experts' matrix products.

    name, reason = choose_grouped_matmul(config.compute.grouped_matmul, platform="gpu", ...)
    (out_RF,) = grouped_matmul(x_RD, (w_EDF,), sizes_E, name)
    gate_RF, up_RF = spread_products(numerics.experts, name, dims, x_ND, plan, (gate_EDF, up_EDF))
    out_ND = collected_product(numerics.experts, name, dims, hidden_RF, plan, down_EFD)

Dims: N tokens, R rows, E groups, D contracted, F produced. Rows stand in order of their group.
"""

from __future__ import annotations

import jax

from maxlm.kernels.grouped_matmul.blocks import BLOCK, blocks_matmul
from maxlm.kernels.grouped_matmul.choose import choose_grouped_matmul
from maxlm.kernels.grouped_matmul.fp8 import fp8_collected_product, fp8_spread_products
from maxlm.kernels.grouped_matmul.rows import Plan, collect, spread
from maxlm.numerics import Fp8, Plain
from maxlm.parallel.sharding import Dims

__all__ = ["GROUP_MULTIPLE", "ROW_MULTIPLE", "Plan", "choose_grouped_matmul", "collect", "collected_product",
           "grouped_matmul", "grouped_swiglu", "has_swiglu", "spread", "spread_products"]

# what each group's rows must be padded to
GROUP_MULTIPLE = {"blocks": BLOCK, "ragged_dot": 1, "mosaic_gpu": 128, "mosaic_tpu": 1}
ROW_MULTIPLE = 128  # what all rows together must be padded to


def grouped_matmul(x_RD: jax.Array, weights: tuple[jax.Array, ...], sizes_E: jax.Array,
                   implementation: str) -> tuple[jax.Array, ...]:
    """x's product with each of the weights, [E, D, F]: [R, F] in x's dtype, accumulated in float32; 0 in rows behind
    the last group, whatever x holds there.

    sizes_E: int32, multiples of GROUP_MULTIPLE[implementation]. Differentiable in x and the weights.
    """
    if implementation == "ragged_dot":
        return tuple(jax.lax.ragged_dot(x_RD, w_EDF, sizes_E) for w_EDF in weights)
    if implementation == "blocks":
        return tuple(blocks_matmul(x_RD, w_EDF, sizes_E) for w_EDF in weights)
    if implementation == "mosaic_gpu":
        from maxlm.kernels.grouped_matmul.mosaic_gpu import mosaic_gpu_matmul  # Pallas is slow to import

        return mosaic_gpu_matmul(x_RD, weights, sizes_E)
    if implementation == "mosaic_tpu":
        from maxlm.kernels.grouped_matmul.mosaic_tpu import mosaic_tpu_matmul

        return tuple(mosaic_tpu_matmul(x_RD, w_EDF, sizes_E) for w_EDF in weights)
    raise ValueError(f"grouped_matmul implementation {implementation!r} is not one of {sorted(GROUP_MULTIPLE)}")


def has_swiglu(numerics: Plain | Fp8, implementation: str) -> bool:
    """Whether there is a `grouped_swiglu`."""
    return isinstance(numerics, Plain) and implementation == "mosaic_gpu"


def grouped_swiglu(x_RD: jax.Array, weights: tuple[jax.Array, jax.Array, jax.Array], weight_R: jax.Array,
                   sizes_E: jax.Array, implementation: str) -> jax.Array:
    """Rows through the SwiGLU of their groups, weights (gate and up [E, D, F], down [E, F, D]), times weight_R
    (float32): [R, D]; 0 behind the last group. Units and their gradients are made inside of the products' kernels."""
    assert implementation == "mosaic_gpu", implementation
    from maxlm.kernels.grouped_matmul.mosaic_gpu import mosaic_gpu_swiglu  # Pallas is slow to import

    return mosaic_gpu_swiglu(x_RD, weights, weight_R, sizes_E)


def spread_products(numerics: Plain | Fp8, implementation: str, dims: Dims | None, x_ND: jax.Array, plan: Plan,
                    weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """`grouped_matmul` of the tokens, spread over the plan's rows, with each of `weights`. Those of `Fp8` are float32
    and laid out as stored (dims: `fp8_spread_products`); those of `Plain` are cast and gathered."""
    if isinstance(numerics, Fp8):
        return fp8_spread_products(numerics, implementation, dims, x_ND, plan, weights)
    return grouped_matmul(spread(x_ND, plan), weights, plan.sizes_E, implementation)


def collected_product(numerics: Plain | Fp8, implementation: str, dims: Dims | None, h_RF: jax.Array, plan: Plan,
                      weight_EFD: jax.Array) -> jax.Array:
    """`grouped_matmul` of rows with a weight (as above), collected for the plan's tokens: [N, D]."""
    if isinstance(numerics, Fp8):
        return fp8_collected_product(numerics, implementation, dims, h_RF, plan, weight_EFD)
    return collect(grouped_matmul(h_RF, (weight_EFD,), plan.sizes_E, implementation)[0], plan)
