"""Matrix products of 8-bit floats: E4M3 forward, E5M2 gradients (Micikevicius et al. 2022, arXiv:2209.05433).

Operands are scaled to the range of their format by what is in them now (current scaling), so there is no state: one
scale a tensor, or one a row and column ('row': everything that one element of the result is a sum over). Scales are
multiplied onto the result, which leaves the product itself to 8-bit units: cuBLASLt takes it where both operands are
contracted along their last dims. What has to be turned for that is turned as 8-bit values, behind a barrier, without
which the compiler would quantise twice from 16 bits (docs/LOG.md).

cuBLASLt also takes a scale for each operand, and XLA gives it both where it finds a product of values in bfloat16 that
come from 8 bits times a scalar (`scaled_operands`): no pass over the result then, 0.76 instead of 1.12 ms for 32768 x
2048 by 8192 on an H100. So scales are the inverses of bfloat16 numbers, in every form.

Hopper's tensor cores add 8-bit products up to some 14 bits (arXiv:2412.19437, section 3.5.2), which cuBLASLt makes good
every so often only where it is asked to ("fast accumulation" is JAX's default precision). A gradient of a weight is a
sum over all tokens, and needs it: with 65,536 of them, held-out loss ended 0.6% above bf16's without and equal to it
with (docs/FP8.md). Sums over a layer's width do not.

NaN and infinity make NaN of everything that shares their scale, never a finite number.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from maxlm.numerics.turn import rounded, rounded_and_turned, turned
from maxlm.parallel.sharding import ACTIVATION, COMPUTE, Dims, has_mesh, spec, whole_length

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
_LARGEST_SCALE = 2.0**126  # its inverse is still a normal float32


@dataclass(frozen=True)
class Fp8:
    """Products of 8-bit operands, accumulated in float32, for activations in `dtype`.

    scaling: 'tensor', or 'row'. power_of_two: scales are rounded down to powers of two, which makes scaling exact.
    scaled_operands: with a scale a tensor, the form that XLA for NVIDIA GPUs makes one call of; other compilers would
    multiply 16-bit values. careful_sums: gradients of weights are summed in float32, where NVIDIA GPUs would not.
    """

    dtype: jnp.dtype
    scaling: Literal["tensor", "row"]
    power_of_two: bool = False
    scaled_operands: bool = False
    careful_sums: bool = False

    def einsum(self, subscripts: str, x: jax.Array, weight: nnx.Param, out: Dims) -> jax.Array:
        """`Plain.einsum` for subscripts of the form '<batch><contracted>,<contracted><produced>-><batch><produced>'.

        Under FSDP the weight is quantised where it is stored, and gathered in 8 bits. Its gradient is float32.
        """
        operands, result = subscripts.split("->")
        x_dims, w_dims = operands.split(",")
        contracted = sum(dim in x_dims for dim in w_dims)
        assert x_dims[-contracted:] == w_dims[:contracted], subscripts
        assert result == x_dims[:-contracted] + w_dims[contracted:], subscripts
        layouts = (spec(out, ACTIVATION), spec(weight.dims, COMPUTE)) if has_mesh() else (None, None)
        return _product(self, contracted, *layouts, x, weight[...])


class Quantised(NamedTuple):
    """`values` times `factors` is what was quantised. factors: float32, of as many dims, each 1 where it is shared."""

    values: jax.Array
    factors: jax.Array

    def turned(self, count: int) -> Quantised:
        """With the first `count` dims last."""
        order = (*range(count, self.values.ndim), *range(count))
        values, factors = jax.lax.optimization_barrier(self)
        return Quantised(turned(values, count), factors.transpose(order))

    def gathered(self, layout: P | None) -> Quantised:
        """Laid out for use."""
        if layout is None:
            return self
        return Quantised(jax.sharding.reshard(self.values, layout), _like(self.factors, layout))

    def whole_length(self) -> Quantised:
        """Activations [B, T, ...] of the residual stream, gathered over `tensor` in 8 bits."""
        layout = _layout(self.values)
        return self.gathered(None if layout is None else P(*spec(("batch", "length"), ACTIVATION), *layout[2:]))


def quantise(x: jax.Array, dtype: jnp.dtype, axes: range, recipe: Fp8) -> Quantised:
    """x in `dtype`, scaled along `axes`, or by one scale where the recipe has one a tensor."""
    return scaled(x, dtype, tuple(axes) if recipe.scaling == "row" else None, recipe.power_of_two)


def quantise_both_ways(x: jax.Array, dtype: jnp.dtype, batch: int, recipe: Fp8) -> tuple[Quantised, Quantised]:
    """x by one scale, at `whole_length`; and that with its first `batch` dims last."""
    if has_mesh() and jax.sharding.get_abstract_mesh().shape["tensor"] > 1:  # gathered once, then turned
        x8 = scaled(x, dtype, None, recipe.power_of_two).whole_length()
        return x8, x8.turned(batch)
    x, factor = whole_length(x), _factor((x,), dtype, None, recipe.power_of_two)
    values, by_last = rounded_and_turned(x, factor, dtype, batch)
    return Quantised(values, factor), Quantised(by_last, factor)


def scaled(x: jax.Array, dtype: jnp.dtype, axes: tuple[int, ...] | None, power_of_two: bool,
           over: tuple[str, ...] = ()) -> Quantised:
    """x in `dtype`, scaled so that its largest value along `axes` (None: all) is the format's; zeros are left alone.
    over: in a `shard_map`, the mesh axes along which more of what shares a scale lies."""
    return scaled_alike((x,), dtype, axes, power_of_two, over)[0]


def scaled_alike(xs: Sequence[jax.Array], dtype: jnp.dtype, axes: tuple[int, ...] | None, power_of_two: bool,
                 over: tuple[str, ...] = ()) -> list[Quantised]:
    """`scaled` of each, with scales that serve all."""
    factor = _factor(xs, dtype, axes, power_of_two, over)
    return [Quantised(rounded(x, factor, dtype), factor) for x in xs]


def _factor(xs, dtype, axes, power_of_two, over=()):
    largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axes, keepdims=True)
                                             for x in xs))
    largest = jax.lax.pmax(largest, over) if over else largest
    factor = jnp.where(largest == 0, 1.0, jnp.maximum(largest / float(jnp.finfo(dtype).max), 1 / _LARGEST_SCALE))
    if power_of_two:
        mantissa, exponent = jnp.frexp(factor)
        factor = jnp.where((mantissa == 0.5) | ~jnp.isfinite(factor), factor, jnp.ldexp(1.0, exponent))
    else:  # rounding down takes the largest value beyond the format's by less than half of its last place
        factor = factor.astype(jnp.bfloat16).astype(jnp.float32)
    return factor


def product(recipe: Fp8, a: Quantised, b: Quantised, count: int, dtype: jnp.dtype, layout: P | None,
            precision: jax.lax.Precision | None = None) -> jax.Array:
    """[a's other dims, b's other dims] in `dtype`: the sum over the last `count` dims of both."""
    last = tuple(range(-count, 0))
    contracting = tuple(range(a.values.ndim - count, a.values.ndim)), tuple(range(b.values.ndim - count, b.values.ndim))
    multiply = functools.partial(jax.lax.dot_general, dimension_numbers=(contracting, ((), ())),
                                 preferred_element_type=jnp.bfloat16, precision=precision, out_sharding=layout)
    if recipe.scaled_operands:
        return multiply(*(q.values.astype(jnp.bfloat16) * q.factors.reshape(()).astype(jnp.bfloat16)
                          for q in (a, b))).astype(dtype)
    y = multiply(a.values, b.values)
    left, right = jnp.squeeze(a.factors, last), jnp.squeeze(b.factors, last)
    left_dims, right_dims = left.ndim, right.ndim
    left = jnp.expand_dims(left, tuple(range(left_dims, y.ndim)))
    right = jnp.expand_dims(right, tuple(range(y.ndim - right_dims)))
    left, right = _like(left, layout), _like(right, layout)
    return (y.astype(jnp.float32) * left * right).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _product(recipe: Fp8, contracted: int, out: P | None, layout: P | None, x: jax.Array, w: jax.Array) -> jax.Array:
    return _forward(recipe, contracted, out, layout, x, w)[0]


def _forward(recipe, contracted, out, layout, x, w):
    x8 = quantise(x, FORWARD, range(x.ndim - contracted, x.ndim), recipe)
    w8 = quantise(w, FORWARD, range(contracted), recipe).gathered(layout)
    with jax.named_scope("fp8_forward"):
        y = product(recipe, x8.whole_length(), w8.turned(contracted), contracted, recipe.dtype, out)
    # A scale a row belongs to one product: the backward pass then starts again from what was given.
    return y, (x8, w8, w) if recipe.scaling == "tensor" else (x, None, w)


def _backward(recipe, contracted, out, layout, kept, g):
    x, w8, w = kept
    batch, produced = g.ndim - (w.ndim - contracted), w.ndim - contracted
    x_layout, w_layout = _layout(x.values if recipe.scaling == "tensor" else x), _layout(w)
    if recipe.scaling == "tensor":
        g8, g8_turned = quantise_both_ways(g, BACKWARD, batch, recipe)
    else:
        g8 = quantise(g, BACKWARD, range(batch, g.ndim), recipe).whole_length()
        w8 = quantise(w, FORWARD, range(contracted, w.ndim), recipe).gathered(layout)
    with jax.named_scope("fp8_input_gradient"):
        dx = product(recipe, g8, w8, produced, recipe.dtype, x_layout)
    if recipe.scaling == "row":
        x = quantise(x, FORWARD, range(batch), recipe)
        g8_turned = quantise(g, BACKWARD, range(batch), recipe).whole_length().turned(batch)
    precision = jax.lax.Precision.HIGHEST if recipe.careful_sums else None
    with jax.named_scope("fp8_weight_gradient"):
        dw = product(recipe, x.whole_length().turned(batch), g8_turned, batch, jnp.float32, layout, precision)
    return dx, dw if layout is None else jax.sharding.reshard(dw, w_layout)


_product.defvjp(_forward, _backward)


def _like(factors: jax.Array, layout: P | None) -> jax.Array:
    """Factors of values that are laid out so."""
    if layout is None:
        return factors
    kept = P(*(axis if size > 1 else None for axis, size in zip(layout, factors.shape, strict=True)))
    return jax.sharding.reshard(factors, kept)


def _layout(x: jax.Array) -> P | None:
    return jax.typeof(x).sharding.spec if has_mesh() else None
