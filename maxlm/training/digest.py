"""Digests of arrays, computed where the arrays are.

Each 32-bit word of an array is mixed with its position and the array's name, and the results are added modulo 2^32, in
two lanes. Addition of integers has no order, so a digest is the same on any mesh, any number of processes and any
layout, and needs no array to be gathered. One changed word always changes it; anything else goes unnoticed with
probability 2^-64. It guards against accidents, not against an adversary.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from maxlm.checkpoint import named_leaves
from maxlm.parallel.memory import on_device

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes an element


def tree_digest(tree: Any) -> jax.Array:
    """Digest of every array of a pytree, names and positions included: uint32 [2]. For use inside `jax.jit`.

    Raises TypeError for elements of 8 bytes.
    """
    total = jnp.zeros(2, jnp.uint32)
    for name, leaf in named_leaves(on_device(tree)).items():
        total += array_digest(leaf, name)
    return total


def array_digest(x: jax.Array, name: str = "") -> jax.Array:
    """Digest of one array under `name`: uint32 [2]."""
    return jnp.stack([jnp.sum(lane, dtype=jnp.uint32) for lane in _lanes(x, name)])


def row_digests(x: jax.Array) -> jax.Array:
    """A digest of each row of x [B, ...], in which a row's place does not count: uint32 [B, 2]."""
    inner = tuple(range(1, x.ndim))
    position = positions(x.shape, inner)
    return jnp.stack([jnp.sum(lane, axis=inner, dtype=jnp.uint32) for lane in _mixed(x, position, "")], axis=1)


def hex_digest(digest: Any) -> str:
    """The 16 hexadecimal digits by which a digest is written down."""
    return "".join(f"{int(lane):08x}" for lane in np.asarray(digest))


def _lanes(x: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
    return _mixed(x, positions(x.shape, tuple(range(x.ndim))), name)


def positions(shape: tuple[int, ...], dims: tuple[int, ...], layout: P | None = None) -> jax.Array:
    """The place of each element among `dims` in C order, modulo 2^32. layout: over the mesh, where one is installed."""
    position = jnp.zeros(shape, jnp.uint32, out_sharding=layout)
    for dim in dims:
        stride = math.prod(shape[dim + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, dim, out_sharding=layout) * jnp.uint32(stride)
    return position


def _mixed(x: jax.Array, position: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
    if x.dtype.itemsize not in _WORDS:
        raise TypeError(f"{name or 'array'}: {x.dtype} has no digest, its elements are of {x.dtype.itemsize} bytes")
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    word = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    salt, other = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], "<u4")
    key = scrambled(position + jnp.uint32(salt))
    return scrambled(word ^ key), scrambled((word + key) * jnp.uint32(0xCC9E2D51) + jnp.uint32(other))


def scrambled(h: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every bit depends on every other: the finalizer of MurmurHash3."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
