"""An optimizer's moments, stored in fewer bits than they are computed in.

bfloat16: rounded to the nearest, or stochastically (the expectation of what is stored is what was computed).
float8: a byte a value and a byte a block, as blockwise 8-bit optimizers have (Dettmers et al. 2022, arXiv:2110.02861)
with other codes. A code is a window on a float32's own bits, three of its mantissa and as many of its exponent as fit:
the block's byte is the exponent of its largest value, and codes count down from there. mu has a sign and 16 powers of
two, nu none and 32. So a block's scale is exact, an outlier costs nothing but range, and a nu that is not 0 is never
stored as 0: below the window it becomes the smallest value in it, and what it divides is too small rather than without
bound. float8 is always rounded stochastically: a moving average moves by less than half a step of 8 bits and would
stand still (so does bfloat16's where b2 is above 0.996).

The random bits are a function of the seed, the number of updates made and the parameter's name, whatever the mesh.
A block lies within a dim that FSDP does not split, and within each part of one that `tensor` splits, so nothing is
asked of another device.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from maxlm.checkpoint.leaves import leaf_name
from maxlm.numerics.blocks import Block, block_along, cut, joined
from maxlm.parallel.sharding import STORAGE, Dims, has_mesh
from maxlm.schema import ConfigError
from maxlm.training.digest import positions, scrambled

_CUT = 20  # of a float32's 23 mantissa bits those that a code leaves out


class Packed(NamedTuple):
    """A moment in float8. codes: uint8, of the parameter's shape; exponents: uint8, one a block."""

    codes: Any
    exponents: Any


@dataclass(frozen=True)
class Rounding:
    """One moment's way into storage. `signed`: it may be negative."""

    dtype: str
    signed: bool
    stochastic: bool

    def store(self, moment: Any, key: jax.Array) -> Any:
        """float32 moments of a tree of parameters -> what is kept of them."""
        if self.dtype == "float32":
            return moment
        if self.dtype == "bfloat16":
            if not self.stochastic:
                return jax.tree.map(lambda x: x.astype(jnp.bfloat16), moment)
            return _each(lambda name, _, x: _bfloat16(x, self._bits(key, name, x)), moment)
        exponents = _each(lambda _, dims, x: block_exponents(x, block_of(dims, x.shape), self.signed), moment)
        encoded = lambda name, dims, x, e: encode(  # noqa: E731
            x, e, block_of(dims, x.shape), self.signed, self._bits(key, name, x))
        return Packed(_each(encoded, moment, exponents), exponents)

    def load(self, kept: Any) -> Any:
        """What was stored -> float32."""
        if self.dtype == "float8":
            return _each(lambda _, dims, c, e: decode(c, e, block_of(dims, c.shape), self.signed), *kept)
        return jax.tree.map(lambda x: x.astype(jnp.float32), kept)

    def _bits(self, key: jax.Array, name: str, x: jax.Array) -> jax.Array:
        """16 random bits for each of x's values, in its layout; of each word of 32 both moments have one half.

        A hash of the place under two words of the parameter's key: threefry for every value would cost more than the
        update (docs/LOG.md).
        """
        first, second = jax.random.bits(jax.random.fold_in(key, zlib.crc32(name.encode())), (2,), jnp.uint32)
        layout = jax.typeof(x).sharding.spec if has_mesh() else None
        word = scrambled(scrambled(positions(x.shape, tuple(range(x.ndim)), layout) + first) ^ second)
        return word >> 16 if self.signed else word & 0xFFFF


def stored_in(inner: optax.GradientTransformation, roundings: dict[str, Rounding],
              seed: jax.Array | int) -> optax.GradientTransformation:
    """`inner`, whose state has a `count` and float32 moments, with the named moments kept as their `Rounding` says.

    seed: of stochastic rounding. Raises ConfigError, at init, where the installed mesh would split a block of float8.
    """

    def every(state: Any, change: Callable[[Rounding, Any], Any]) -> Any:
        return state._replace(**{name: change(r, getattr(state, name)) for name, r in roundings.items()})

    def init(params: Any) -> Any:
        state = inner.init(params)
        for name, rounding in roundings.items():
            if rounding.dtype == "float8" and has_mesh():
                _each(lambda leaf, dims, x, name=name: _check_blocks(f"{name}_dtype", leaf, dims, x.shape), params)
        return every(state, lambda r, moment: r.store(moment, jax.random.key(0)))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(grads, every(state, Rounding.load), params)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"moments")), state.count)
        return updates, every(state, lambda r, moment: r.store(moment, key))

    return optax.GradientTransformation(init, update)


def block_of(dims: Dims, shape: tuple[int, ...]) -> Block:
    """How a parameter with logical `dims` is cut: along the last dim that FSDP does not split. The same on any mesh."""
    splits = [STORAGE.get(dim) for dim in dims]
    whole = [i for i, axes in enumerate(splits) if axes in (None, "tensor")] or [len(dims) - 1]
    dim = whole[-1]
    return block_along(dim - len(dims), shape[dim - len(dims)], splits[dim] == "tensor")


def block_exponents(x: jax.Array, block: Block, signed: bool) -> jax.Array:
    """The biased exponent of each block's largest value once it is rounded up, and no less than a window's height."""
    largest = jnp.max(jnp.abs(cut(x, block)), axis=block.dim)
    bits = jax.lax.bitcast_convert_type(largest, jnp.uint32)
    return jnp.maximum((bits + ((1 << _CUT) - 1)) >> 23, _powers(signed)).astype(jnp.uint8)


def encode(x: jax.Array, exponents: jax.Array, block: Block, signed: bool, random16: jax.Array) -> jax.Array:
    """uint8 codes of x, rounded stochastically by 16 random bits a value."""
    base, size = _base(exponents, block, signed), x.shape[block.dim]
    x, dither = cut(x, block), (cut(random16, block) << (_CUT - 16)) + (1 << (_CUT - 17))
    magnitude = jnp.abs(x)
    code = ((jax.lax.bitcast_convert_type(magnitude, jnp.uint32) + dither) >> _CUT).astype(jnp.int32) - base
    code = jnp.minimum(code, 8 * _powers(signed) - 1)
    smallest = _value(base + 1)
    if signed:  # below the window, one or the other: 0, or the smallest value
        below = (dither.astype(jnp.float32) * smallest < magnitude * float(1 << _CUT)).astype(jnp.int32)
    else:
        below = (magnitude > 0).astype(jnp.int32)
    code = jnp.where(magnitude < smallest, below, code)
    return joined((code + jnp.where((x < 0) & (code > 0), 128, 0)).astype(jnp.uint8), block, size)


def decode(codes: jax.Array, exponents: jax.Array, block: Block, signed: bool) -> jax.Array:
    """The float32 values of `codes`."""
    code = cut(codes, block).astype(jnp.int32)
    place = code & 127 if signed else code
    value = jnp.where(place == 0, 0.0, _value(place + _base(exponents, block, signed)))
    return joined(jnp.where(code > 127, -value, value) if signed else value, block, codes.shape[block.dim])


def _powers(signed: bool) -> int:
    """Powers of two in a window: those of 7 or 8 bits of which three are mantissa."""
    return 16 if signed else 32


def _value(top_bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(top_bits << _CUT, jnp.float32)


def _base(exponents: jax.Array, block: Block, signed: bool) -> jax.Array:
    """The top bits that code 0 of each block stands for: int32, to be broadcast over the values of a block."""
    base = (exponents.astype(jnp.int32) - (_powers(signed) - 1)) * 8
    return jnp.expand_dims(base, block.dim)


def _bfloat16(x: jax.Array, random16: jax.Array) -> jax.Array:
    """x in bfloat16, up or down with the probability that makes the expectation x; what is not finite stays so."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(((bits + random16) >> 16) << 16, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _each(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`function(name, logical dims, array, the others' arrays)` for every parameter, in the structure of `tree`."""

    def one(path: tuple[Any, ...], param: nnx.Param, *rest: Any) -> Any:
        return jax.tree.map(lambda *arrays: function(leaf_name(path), param.dims, *arrays), param, *rest)

    return jax.tree_util.tree_map_with_path(one, tree, *others, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def _check_blocks(field: str, name: str, dims: Dims, shape: tuple[int, ...]) -> None:
    block = block_of(dims, shape)
    axes = STORAGE.get(dims[block.dim]) or ()
    sizes = jax.sharding.get_abstract_mesh().shape
    ways = math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
    if block.count % ways:
        raise ConfigError(
            f"optimizer.{field}='float8' keeps {name} in {block.count} blocks of {block.size} along "
            f"{dims[block.dim]!r}, which {ways} devices cannot share: use bfloat16, or fewer devices along mesh.tensor"
        )
