"""The experts' products of 8-bit floats: formats and scales as in numerics/fp8.py, on groups of rows.

One scale serves all rows and one each expert's matrix ('tensor'), or each row, each expert's output column and, for
the weights' gradient, each column of all rows has its own ('row'). Scales are of the whole thing wherever its parts
are, so that a mesh changes the order of sums alone. Weights are quantised where they are stored and gathered over
`fsdp` in 8 bits. Both operands of each product are contracted along their last dims, the only form that Hopper's units
take: what has to be turned for that is turned as 8-bit values.

Dims: R rows, E groups, K contracted, F produced.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from maxlm.kernels.grouped_matmul.eight_bit import grouped_product_8bit, grouped_weights_8bit
from maxlm.numerics.fp8 import BACKWARD, FORWARD, Fp8, Quantised, scaled
from maxlm.parallel.sharding import COMPUTE, STORAGE, TOKENS, Dims


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fp8_products(recipe: Fp8, implementation: str, dims: Dims | None, x_RK: jax.Array, weights: tuple[jax.Array, ...],
                 sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    """The grouped product [R, F] of x with each of `weights` [E, K, F], in `recipe.dtype`; 0 behind the last group.

    dims: in a `shard_map`, the logical dims of a weight, which is float32 and split as it is stored; None where there
    is no mesh. implementation, sizes_E: as for `grouped_matmul`. The weights' gradients are float32.
    """
    return _forward(recipe, implementation, dims, x_RK, weights, sizes_E)[0]


def _forward(recipe, implementation, dims, x_RK, weights, sizes_E):
    x8 = _rows(recipe, x_RK, FORWARD, sizes_E, _axes(COMPUTE, dims, 1), dims)
    w8s = tuple(_gathered(_weight(recipe, w, 1, dims), dims) for w in weights)
    ys = tuple(_product(recipe, implementation, x8, _turned(w8), sizes_E) for w8 in w8s)
    # A scale a row belongs to one product: the backward pass then starts again from what was given.
    return ys, (x8, w8s, sizes_E) if recipe.scaling == "tensor" else (x_RK, weights, sizes_E)


def _backward(recipe, implementation, dims, kept, gs):
    x, w8s, sizes_E = kept
    g8s = [_rows(recipe, g, BACKWARD, sizes_E, _axes(COMPUTE, dims, 2), dims) for g in gs]
    if recipe.scaling == "row":
        w8s = [_gathered(_weight(recipe, w, 2, dims), dims) for w in w8s]
    dx = sum(_product(recipe, implementation, g8, w8, sizes_E) for g8, w8 in zip(g8s, w8s, strict=True))
    if recipe.scaling == "row":
        x, *g8s = (_columns(recipe, rows, dtype, sizes_E, dims)
                   for rows, dtype in ((x, FORWARD), *((g, BACKWARD) for g in gs)))
    x_turned = _turned(x)
    dws = []
    for g8 in g8s:
        dw = grouped_weights_8bit(x_turned.values, _turned(g8).values, sizes_E, implementation)
        dw = dw * jnp.swapaxes(x.factors, 0, 1)[None] * g8.factors[None]
        dws.append(_reduced(dw.astype(recipe.dtype), dims).astype(jnp.float32))  # summed over devices as in bf16
    return dx, tuple(dws), None


fp8_products.defvjp(_forward, _backward)


def _product(recipe, implementation, a8, b8, sizes_E):
    """[R, F]: a8 [R, K] with b8 [E, F, K]."""
    y_RF = grouped_product_8bit(a8.values, b8.values, sizes_E, implementation).astype(jnp.float32)
    group_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(y_RF.shape[0], dtype=jnp.int32), side="right")
    return (y_RF * a8.factors * b8.factors[..., 0].at[group_R].get(mode="clip")).astype(recipe.dtype)


def _rows(recipe, rows_RK, dtype, sizes_E, across, dims):
    """With a scale a row, or one of all. across: mesh axes that K is split over."""
    if recipe.scaling == "row":
        return scaled(_held(rows_RK, sizes_E), dtype, (1,), recipe.power_of_two, across)
    return scaled(_held(rows_RK, sizes_E), dtype, None, recipe.power_of_two, (*TOKENS, "tensor") if dims else ())


def _columns(recipe, rows_RK, dtype, sizes_E, dims):
    return scaled(_held(rows_RK, sizes_E), dtype, (0,), recipe.power_of_two, TOKENS if dims else ())


def _weight(recipe, w_EKF, contracted, dims):
    """With a scale for each expert and what remains once dim `contracted` is summed over; or one an expert."""
    axes = (contracted,) if recipe.scaling == "row" else (1, 2)
    return scaled(w_EKF, FORWARD, axes, recipe.power_of_two, _axes(STORAGE, dims, *axes))


def _held(rows, sizes_E):
    """Zeros behind the last group, whatever is there."""
    return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(sizes_E))[:, None], rows, 0)


def _turned(a: Quantised) -> Quantised:
    """With the last two dims exchanged; behind a barrier, without which the compiler would quantise twice."""
    return Quantised(*(jnp.swapaxes(part, -1, -2) for part in jax.lax.optimization_barrier(a)))


def _axes(layout, dims, *places):
    """The mesh axes that a weight's dims at `places` are split over."""
    splits = [layout[dims[place]] or () for place in places] if dims else []
    return tuple(axis for split in splits for axis in ((split,) if isinstance(split, str) else split))


def _stored_split(dims):
    """(dim, mesh axes) along which a weight is gathered for use."""
    return next((place, STORAGE[dim]) for place, dim in enumerate(dims) if STORAGE[dim] != COMPUTE[dim])


def _gathered(w8: Quantised, dims) -> Quantised:
    if not dims:
        return w8
    place, axis = _stored_split(dims)
    return Quantised(*(jax.lax.all_gather(part, axis, axis=place, tiled=True)
                       if part.shape[place] > 1 or part is w8.values else part for part in w8))


def _reduced(dw_EKF, dims):
    """A device's part of the sum over all rows, as the weight is stored."""
    if not dims:
        return dw_EKF
    place, axis = _stored_split(dims)
    return jax.lax.psum(jax.lax.psum_scatter(dw_EKF, axis, scatter_dimension=place, tiled=True), "data")
