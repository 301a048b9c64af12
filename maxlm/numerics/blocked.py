"""Matrix products of 8-bit blocks (DeepSeek-V3, arXiv:2412.19437, section 3.3): E4M3 forward and for gradients.

An activation or gradient has a scale for each 128 values along what is summed, a weight one for each 128 by 128. Scales
are powers of two, so what the blocks hold is exact in bfloat16 again: the product is computed from that, which gives
what an 8-bit product with float32 sums of its blocks would (docs/FP8.md says what it costs). Blocks end with their dim
(head size 64: blocks of 64), and the last may be short. The gradient of a weight sums over tokens, along which both its
operands are quantised from what was given.

NaN and infinity make NaN of their block, never a finite number.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from maxlm.numerics.blocks import Block, block_along, cut, joined
from maxlm.parallel.sharding import ACTIVATION, COMPUTE, Dims, has_mesh, spec, whole_length
from maxlm.schema import ConfigError

FORMAT = jnp.float8_e4m3fn


@dataclass(frozen=True)
class Fp8Blocks:
    """Products of 8-bit blocks for activations in `dtype`."""

    dtype: jnp.dtype

    def einsum(self, subscripts: str, x: jax.Array, weight: nnx.Param, out: Dims) -> jax.Array:
        """`Fp8.einsum`: '<batch><contracted>,<contracted><produced>-><batch><produced>'.

        Under FSDP the weight is quantised where it is stored, and gathered in 8 bits. Raises ConfigError where
        devices along `tensor` would split a block.
        """
        operands, result = subscripts.split("->")
        x_dims, w_dims = operands.split(",")
        contracted = sum(dim in x_dims for dim in w_dims)
        assert x_dims[-contracted:] == w_dims[:contracted], subscripts
        assert result == x_dims[:-contracted] + w_dims[contracted:], subscripts
        layouts = (spec(out, ACTIVATION), spec(weight.dims, COMPUTE)) if has_mesh() else (None, None)
        shape = _Shape(contracted, *(_block(weight, dim) for dim in (contracted - 1, -1)),
                       "embed" in weight.dims[:contracted], *layouts)
        return _product(self.dtype, shape, x, weight[...])


def _block(weight: nnx.Param, dim: int) -> Block:
    size, axis = weight.shape[dim], COMPUTE.get(weight.dims[dim])
    block = block_along(dim if dim < 0 else dim - len(weight.dims), size, axis is not None)
    ways = jax.sharding.get_abstract_mesh().shape[axis] if axis and has_mesh() else 1
    if block.count % ways:
        raise ConfigError(
            f"precision.recipe='fp8_block' cuts {weight.dims[dim]!r} of {size} into {block.count} blocks, which "
            f"mesh.{axis}={ways} devices cannot share: use fewer, or another recipe"
        )
    return block


class _Shape(NamedTuple):
    """How a weight's dims are contracted and cut (its last contracted one and its last one), and laid out.
    fsdp_into: whether FSDP splits the contracted ones."""

    contracted: int
    into: Block
    out_of: Block
    fsdp_into: bool
    out: P | None
    layout: P | None


class Quantised(NamedTuple):
    """E4M3 `values`, and the float32 factor of each block, of as many dims."""

    values: jax.Array
    factors: jax.Array

    def gathered(self, layout: P | None) -> Quantised:
        """Laid out for use."""
        if layout is None:
            return self
        return Quantised(jax.sharding.reshard(self.values, layout), jax.sharding.reshard(self.factors, layout))


def quantise(x: jax.Array, *blocks: Block) -> Quantised:
    """x in E4M3, each block scaled by the power of two that takes its largest value to (224, 448]; by 1 where all of it
    is 0. `blocks`: the dims that are cut, in the order in which their largest values are found."""
    x32 = x.astype(jnp.float32)
    largest = jnp.abs(x32)
    for block in blocks:
        largest = jnp.max(cut(_whole(largest, block), block), axis=block.dim)
    scale = jnp.minimum(float(jnp.finfo(FORMAT).max) / largest, 2.0**126)
    scale = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(scale, jnp.uint32) & 0x7F800000, jnp.float32)
    scale = jnp.where(largest == 0, 1.0, scale)
    return Quantised((x32 * _spread(scale, blocks, x)).astype(FORMAT), 1 / scale)


def dequantised(x: Quantised, dtype: jnp.dtype, *blocks: Block) -> jax.Array:
    """What `x` stands for: exact in bfloat16, but where that is smaller than a normal number."""
    x = jax.lax.optimization_barrier(x)  # a compiler that may keep excess precision would not round at all
    return (x.values.astype(jnp.float32) * _spread(x.factors, blocks, x.values)).astype(dtype)


def _whole(x: jax.Array, block: Block) -> jax.Array:
    """x gathered along the dim that is cut, where devices hold other than whole blocks of it."""
    if not has_mesh():
        return x
    layout, dim = jax.typeof(x).sharding.spec, x.ndim + block.dim
    axes = layout[dim] or ()
    sizes = jax.sharding.get_abstract_mesh().shape
    ways = math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
    if x.shape[dim] % (ways * block.size) == 0 or ways == 1:
        return x
    return jax.sharding.reshard(x, P(*layout[:dim], None, *layout[dim + 1 :]))


def _spread(factors: jax.Array, blocks: tuple[Block, ...], like: jax.Array) -> jax.Array:
    """A factor for every value, laid out as `like`."""
    for block in blocks:
        factors = joined(jnp.expand_dims(factors, block.dim), block, like.shape[block.dim])
    return jax.sharding.reshard(factors, jax.typeof(like).sharding.spec) if has_mesh() else factors


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(dtype: jnp.dtype, shape: _Shape, x: jax.Array, w: jax.Array) -> jax.Array:
    return _forward(dtype, shape, x, w)[0]


def _forward(dtype, shape, x, w):
    # What FSDP splits is cut last: by then there is one value for 128 to be gathered.
    blocks = (shape.out_of, shape.into) if shape.fsdp_into else (shape.into, shape.out_of)
    w8 = quantise(w, *blocks).gathered(shape.layout)
    along = shape.into._replace(dim=-1)
    left = whole_length(dequantised(quantise(x, along), dtype, along))
    right = dequantised(w8, dtype, shape.into, shape.out_of)
    last = tuple(range(x.ndim - shape.contracted, x.ndim))
    with jax.named_scope("fp8_forward"):
        return _dot(left, right, last, tuple(range(shape.contracted)), dtype, shape.out), (x, w8, w)


def _backward(dtype, shape, kept, g):
    x, w8, w = kept
    produced = w.ndim - shape.contracted
    batch = g.ndim - produced
    along = shape.out_of._replace(dim=-1)
    right = dequantised(w8, dtype, shape.into, shape.out_of)
    g8 = whole_length(dequantised(quantise(g, along), dtype, along))
    with jax.named_scope("fp8_input_gradient"):
        dx = _dot(g8, right, tuple(range(batch, g.ndim)), tuple(range(shape.contracted, w.ndim)), dtype, _layout(x))
    left, right = (_over_tokens(whole_length(a), batch, dtype) for a in (x, g))
    tokens = tuple(range(batch))
    with jax.named_scope("fp8_weight_gradient"):
        dw = _dot(left, right, tokens, tokens, dtype, shape.layout).astype(jnp.float32)
    return dx, dw if shape.layout is None else jax.sharding.reshard(dw, _layout(w))


_product.defvjp(_forward, _backward)


def _over_tokens(x: jax.Array, batch: int, dtype: jnp.dtype) -> jax.Array:
    block = block_along(batch - 1 - x.ndim, x.shape[batch - 1], False)
    return dequantised(quantise(x, block), dtype, block)


def _dot(a: jax.Array, b: jax.Array, a_dims: tuple[int, ...], b_dims: tuple[int, ...], dtype: jnp.dtype,
         layout: P | None) -> jax.Array:
    return jax.lax.dot_general(a, b, ((a_dims, b_dims), ((), ())), preferred_element_type=dtype, out_sharding=layout)


def _layout(x: jax.Array) -> P | None:
    return jax.typeof(x).sharding.spec if has_mesh() else None
