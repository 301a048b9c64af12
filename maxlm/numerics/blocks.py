"""Blocks of values along a dim of an array: how it is cut, and the way back.

Cutting makes the blocks a dim and what is in a block the next one: [.., 300, ..] -> [.., 3, 128, ..], filled with 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.parallel.sharding import has_mesh

BLOCK = 128  # values in a block, at most
TENSOR_WAYS = 8  # blocks are small enough for a dim to be split over so many devices, where its size allows


class Block(NamedTuple):
    """Blocks of `size` values along `dim` (counted from the last, negative), `count` of them, the last maybe short."""

    dim: int
    size: int
    count: int


def block_along(dim: int, size: int, split: bool) -> Block:
    """Blocks of 128 along a dim of `size`; of less where the dim may be `split` over devices and each is to hold whole
    ones. The same on any mesh."""
    block = min(size, BLOCK)
    if split and size % (4 * TENSOR_WAYS) == 0:
        block = math.gcd(size // TENSOR_WAYS, BLOCK)
    return Block(dim, block, -(-size // block))


def cut(x: jax.Array, block: Block) -> jax.Array:
    """x with its blocks as a dim of their own, behind the dim of which they are pieces; a short one gets zeros."""
    dim = x.ndim + block.dim
    missing = block.count * block.size - x.shape[dim]
    if missing:
        x = jnp.pad(x, [(0, missing if i == dim else 0) for i in range(x.ndim)])
    shape = (*x.shape[:dim], block.count, block.size, *x.shape[dim + 1 :])
    if not has_mesh():
        return jnp.reshape(x, shape)
    layout = jax.typeof(x).sharding.spec
    return jnp.reshape(x, shape, out_sharding=P(*layout[: dim + 1], None, *layout[dim + 1 :]))


def joined(x: jax.Array, block: Block, size: int) -> jax.Array:
    """The inverse of `cut`, for a dim of `size`; x may have one value for each block."""
    dim = x.ndim + block.dim - 1
    shape = (*x.shape[:dim], block.count * block.size, *x.shape[dim + 2 :])
    layout = None
    if has_mesh():
        layout = jax.typeof(x).sharding.spec
        layout = P(*layout[: dim + 1], *layout[dim + 2 :])
    if x.shape[dim + 1] != block.size:
        full = (*x.shape[: dim + 1], block.size, *x.shape[dim + 2 :])
        x = jnp.broadcast_to(x, full, out_sharding=jax.typeof(x).sharding.spec if has_mesh() else None)
    return jax.lax.slice_in_dim(jnp.reshape(x, shape, out_sharding=layout), 0, size, axis=dim)
