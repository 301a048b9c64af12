"""The experts' products of 8-bit floats: formats and scales as in numerics/fp8.py, on groups of rows.

One scale serves all rows and one each expert's matrices ('tensor': gate and up share one, so that their gradients to
the rows are one sum), or each row, each expert's output column and, for
the weights' gradient, each column of all rows has its own ('row'). Scales are of the whole thing wherever its parts
are, so that a mesh changes the order of sums alone. Weights are quantised where they are stored and gathered over
`fsdp` in 8 bits. Both operands of each product are contracted along their last dims, the only form that Hopper's units
take: what has to be turned for that is turned as 8-bit values. Tokens are quantised before they are spread over rows.

Dims: N tokens, R rows, E groups, K contracted, F produced.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels.grouped_matmul.eight_bit import grouped_product_8bit, grouped_weights_8bit
from maxlm.kernels.grouped_matmul.rows import Plan, collect, spread, spread_turned
from maxlm.numerics.fp8 import BACKWARD, FORWARD, Fp8, Quantised, scaled, scaled_alike
from maxlm.numerics.turn import swapped
from maxlm.parallel.sharding import COMPUTE, REPLICAS, STORAGE, Dims, split_over


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fp8_spread_products(recipe: Fp8, implementation: str, dims: Dims | None, x_NK: jax.Array, plan: Plan,
                        weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The grouped product [R, F], with each of `weights` [E, K, F], of tokens spread over the plan's rows, in
    `recipe.dtype`; 0 behind the last group.

    dims: in a `shard_map`, the logical dims of a weight, which is float32 and split as it is stored; None where there
    is no mesh. implementation, plan.sizes_E: as for `grouped_matmul`. The weights' gradients are float32.
    """
    return _spread_forward(recipe, implementation, dims, x_NK, plan, weights)[0]


def _spread_forward(recipe, implementation, dims, x_NK, plan, weights):
    # Of all tokens: where some have no row, the scale of all can be larger than the rows would need.
    x8 = _kept(_scaled(recipe, x_NK, FORWARD, _axes(COMPUTE, dims, 1), dims))
    w8s, rows8 = _forward_weights(recipe, weights, dims), _spread(x8, plan)
    ys = tuple(_product(recipe, implementation, ((rows8, _turned(w8)),), plan.sizes_E) for w8 in w8s)
    # A scale a row belongs to one product: the backward pass then starts again from what was given.
    return ys, (x8, w8s, plan) if recipe.scaling == "tensor" else (x_NK, weights, plan)


def _spread_backward(recipe, implementation, dims, kept, gs):
    x, weights, plan = kept
    gs = [_held(g, plan.sizes_E) for g in gs]
    g8s, w8s = _gradients(recipe, gs, dims), _backward_weights(recipe, weights, dims)
    dx = collect(_product(recipe, implementation, tuple(zip(g8s, w8s, strict=True)), plan.sizes_E), plan)
    if recipe.scaling == "tensor":
        x_turned = Quantised(spread_turned(x.values, plan), x.factors)
    else:
        x_turned = _turned(_columns(recipe, spread(x, plan), FORWARD, dims))
        g8s = [_columns(recipe, g, BACKWARD, dims) for g in gs]
    return dx, None, _weights_gradients(recipe, implementation, dims, x_turned, g8s, plan.sizes_E)


fp8_spread_products.defvjp(_spread_forward, _spread_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fp8_collected_product(recipe: Fp8, implementation: str, dims: Dims | None, x_RK: jax.Array, plan: Plan,
                          weight: jax.Array) -> jax.Array:
    """The grouped product of the plan's rows with `weight` [E, K, F], collected for its tokens: [N, F] in
    `recipe.dtype`. The rest as above."""
    return _collected_forward(recipe, implementation, dims, x_RK, plan, weight)[0]


def _collected_forward(recipe, implementation, dims, x_RK, plan, weight):
    x8 = _kept(_scaled(recipe, _held(x_RK, plan.sizes_E), FORWARD, _axes(COMPUTE, dims, 1), dims))
    (w8,) = _forward_weights(recipe, (weight,), dims)
    y_NF = collect(_product(recipe, implementation, ((x8, _turned(w8)),), plan.sizes_E), plan)
    return y_NF, (x8, w8, plan) if recipe.scaling == "tensor" else (x_RK, weight, plan)


def _collected_backward(recipe, implementation, dims, kept, g_NF):
    x, weight, plan = kept
    g8 = _spread(_scaled(recipe, g_NF, BACKWARD, _axes(COMPUTE, dims, 2), dims), plan)
    dx = _product(recipe, implementation, ((g8, *_backward_weights(recipe, (weight,), dims)),), plan.sizes_E)
    if recipe.scaling == "row":
        x = _columns(recipe, _held(x, plan.sizes_E), FORWARD, dims)
        g8 = _columns(recipe, spread(g_NF, plan), BACKWARD, dims)
    return dx, None, *_weights_gradients(recipe, implementation, dims, _turned(x), (g8,), plan.sizes_E)


fp8_collected_product.defvjp(_collected_forward, _collected_backward)


def _weights_gradients(recipe, implementation, dims, x_turned, g8s, sizes_E):
    """Of each g8 the weight's, from x8's (turned) and its rows: float32, as the weight is stored."""
    dws = []
    for g8 in map(_turned, g8s):
        whole = (x_turned.factors * g8.factors).reshape(()) if recipe.scaling == "tensor" else jnp.float32(1)
        dw = grouped_weights_8bit(x_turned.values, g8.values, sizes_E, whole, implementation)
        if recipe.scaling == "row":
            dw = dw * x_turned.factors[None] * jnp.swapaxes(g8.factors, 0, 1)[None]
        dws.append(_reduced(dw.astype(recipe.dtype), dims).astype(jnp.float32))  # summed over devices as in bf16
    return tuple(dws)


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


def _scaled(recipe, rows_RK, dtype, across, dims):
    """With a scale a row, or one of all. across: mesh axes that K is split over."""
    if recipe.scaling == "row":
        return scaled(rows_RK, dtype, (1,), recipe.power_of_two, across)
    return scaled(rows_RK, dtype, None, recipe.power_of_two, _everywhere(rows_RK, dims))


def _everywhere(rows, dims):
    return (*split_over(rows), "tensor") if dims else ()


def _spread(x8: Quantised, plan: Plan) -> Quantised:
    """The tokens' values in their rows; so far fewer are quantised, and half of the bytes are moved."""
    return Quantised(spread(x8.values, plan), x8.factors if x8.factors.shape[0] == 1 else spread(x8.factors, plan))


def _kept(x8: Quantised) -> Quantised:
    """By the name that a rematerialisation may keep it by; as integers, because JAX rounds floats that it keeps to
    their format as if its largest exponent were infinity's, and E4M3 has numbers there."""
    bits = jax.lax.bitcast_convert_type(x8.values, jnp.uint8)
    bits, factors = (checkpoint_name(part, "8bit") for part in (bits, x8.factors))
    return Quantised(jax.lax.bitcast_convert_type(bits, x8.values.dtype), factors)


def _gradients(recipe, gs, dims):
    """Those that are added up have one scale ('tensor'), so that one product can."""
    if recipe.scaling == "row":
        return [_scaled(recipe, g, BACKWARD, _axes(COMPUTE, dims, 2), dims) for g in gs]
    return scaled_alike(gs, BACKWARD, None, recipe.power_of_two, _everywhere(gs[0], dims))


def _columns(recipe, rows_RK, dtype, dims):
    return scaled(rows_RK, dtype, (0,), recipe.power_of_two, split_over(rows_RK))


def _forward_weights(recipe, weights, dims):
    return tuple(_kept(_gathered(w8, dims)) for w8 in _weights(recipe, weights, 1, dims))


def _backward_weights(recipe, weights, dims):
    """For sums over their last dim, from what the forward pass kept of them."""
    if recipe.scaling == "tensor":
        return weights
    return tuple(_gathered(w8, dims) for w8 in _weights(recipe, weights, 2, dims))


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
    values, factors = jax.lax.optimization_barrier(a)
    return Quantised(swapped(values), jnp.swapaxes(factors, -1, -2))


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
