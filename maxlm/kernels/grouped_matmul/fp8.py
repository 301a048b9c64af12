"""The experts' products of 8-bit floats: formats and scales as in numerics/fp8.py, on groups of rows.

One scale serves all rows and one each expert's matrices ('tensor': gate and up share one, so that their gradients to
the rows are one sum), or each row, each expert's output column and, for
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
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels.grouped_matmul.eight_bit import grouped_product_8bit, grouped_weights_8bit
from maxlm.numerics.fp8 import BACKWARD, FORWARD, Fp8, Quantised, scaled, scaled_alike
from maxlm.parallel.sharding import COMPUTE, REPLICAS, STORAGE, Dims, split_over


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
    x8 = _kept(x8)
    w8s = tuple(_kept(_gathered(w8, dims)) for w8 in _weights(recipe, weights, 1, dims))
    ys = tuple(_product(recipe, implementation, ((x8, _turned(w8)),), sizes_E) for w8 in w8s)
    # A scale a row belongs to one product: the backward pass then starts again from what was given.
    return ys, (x8, w8s, sizes_E) if recipe.scaling == "tensor" else (x_RK, weights, sizes_E)


def _backward(recipe, implementation, dims, kept, gs):
    x, w8s, sizes_E = kept
    g8s = _gradients(recipe, gs, sizes_E, _axes(COMPUTE, dims, 2), dims)
    if recipe.scaling == "row":
        w8s = [_gathered(w8, dims) for w8 in _weights(recipe, w8s, 2, dims)]
    dx = _product(recipe, implementation, tuple(zip(g8s, w8s, strict=True)), sizes_E)
    if recipe.scaling == "row":
        x, *g8s = (_columns(recipe, rows, dtype, sizes_E, dims)
                   for rows, dtype in ((x, FORWARD), *((g, BACKWARD) for g in gs)))
    x_turned, dws = _turned(x), []
    for g8 in map(_turned, g8s):
        whole = (x_turned.factors * g8.factors).reshape(()) if recipe.scaling == "tensor" else jnp.float32(1)
        dw = grouped_weights_8bit(x_turned.values, g8.values, sizes_E, whole, implementation)
        if recipe.scaling == "row":
            dw = dw * x_turned.factors[None] * jnp.swapaxes(g8.factors, 0, 1)[None]
        dws.append(_reduced(dw.astype(recipe.dtype), dims).astype(jnp.float32))  # summed over devices as in bf16
    return dx, tuple(dws), None


fp8_products.defvjp(_forward, _backward)


def _product(recipe, implementation, pairs, sizes_E):
    """[R, F]: the sum over pairs of a8 [R, K] with b8 [E, F, K]."""
    if recipe.scaling == "tensor":  # all pairs have the same scales
        scale_E = (pairs[0][0].factors * pairs[0][1].factors[:, :, 0]).reshape(-1)
        values = tuple((a8.values, b8.values) for a8, b8 in pairs)
        return grouped_product_8bit(values, sizes_E, scale_E, implementation).astype(recipe.dtype)
    group_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(pairs[0][0].values.shape[0], dtype=jnp.int32),
                               side="right")
    one_E = jnp.ones(sizes_E.size, jnp.float32)
    parts = []
    for a8, b8 in pairs:
        y_RF = grouped_product_8bit(((a8.values, b8.values),), sizes_E, one_E, implementation).astype(jnp.float32)
        parts.append(y_RF * a8.factors * b8.factors[..., 0].at[group_R].get(mode="clip"))
    return sum(parts).astype(recipe.dtype)


def _rows(recipe, rows_RK, dtype, sizes_E, across, dims):
    """With a scale a row, or one of all. across: mesh axes that K is split over."""
    if recipe.scaling == "row":
        return scaled(_held(rows_RK, sizes_E), dtype, (1,), recipe.power_of_two, across)
    everywhere = (*split_over(rows_RK), "tensor") if dims else ()
    return scaled(_held(rows_RK, sizes_E), dtype, None, recipe.power_of_two, everywhere)


def _kept(x8: Quantised) -> Quantised:
    """By the name that a rematerialisation keeps it by; as integers, because JAX rounds floats that it keeps to their
    format as if its largest exponent were infinity's, and E4M3 has numbers there."""
    bits = jax.lax.bitcast_convert_type(x8.values, jnp.uint8)
    bits, factors = (checkpoint_name(part, "8bit") for part in (bits, x8.factors))
    return Quantised(jax.lax.bitcast_convert_type(bits, x8.values.dtype), factors)


def _gradients(recipe, gs, sizes_E, across, dims):
    """Those that are added up have one scale ('tensor'), so that one product can."""
    if recipe.scaling == "row":
        return [_rows(recipe, g, BACKWARD, sizes_E, across, dims) for g in gs]
    return scaled_alike([_held(g, sizes_E) for g in gs], BACKWARD, None, recipe.power_of_two,
                        (*split_over(gs[0]), "tensor") if dims else ())


def _columns(recipe, rows_RK, dtype, sizes_E, dims):
    return scaled(_held(rows_RK, sizes_E), dtype, (0,), recipe.power_of_two, split_over(rows_RK))


def _weights(recipe, weights, contracted, dims):
    """With a scale for each expert and what remains once dim `contracted` is summed over; or one an expert, the same in
    all weights."""
    axes = (contracted,) if recipe.scaling == "row" else (1, 2)
    over = _axes(STORAGE, dims, *axes)
    if recipe.scaling == "row":
        return [scaled(w_EKF, FORWARD, axes, recipe.power_of_two, over) for w_EKF in weights]
    return scaled_alike(weights, FORWARD, axes, recipe.power_of_two, over)


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
    rest = tuple(replicas for replicas in split_over(dw_EKF) if replicas in REPLICAS)
    return jax.lax.psum(jax.lax.psum_scatter(dw_EKF, axis, scatter_dimension=place, tiled=True), rest)
