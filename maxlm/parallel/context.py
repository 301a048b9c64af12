"""Which tokens of a row each device of the mesh axis `context` has.

A row is cut into 2C chunks and device c has chunks c and 2C-1-c ('zig-zag'). Under a causal mask the first chunk has
few keys to see and the last one all of them; together the two of any device see as many as those of any other. A batch
comes in natural order, device c with chunks 2c and 2c+1; `balanced_order` moves its tokens, targets, segment ids and
positions at the start of a step, so that whatever names a token (a digest, a replay, the data) does not know the mesh.
That is 16 bytes a token a step. What works position by position never notices; attention asks `token_index`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.parallel.sharding import ACTIVATION, free_axes, has_mesh, spec

AXIS = "context"


def balanced_order(tree: Any) -> Any:
    """Arrays [B, T, ...] split over `context` with the tokens of each row moved to where they are computed."""
    if not has_mesh() or (ways := jax.sharding.get_abstract_mesh().shape[AXIS]) == 1:
        return tree
    specs = jax.tree.map(lambda a: spec(("batch", "length", *(None,) * (a.ndim - 2)), ACTIVATION), tree)
    move = functools.partial(jax.tree.map, functools.partial(_balance, ways=ways))
    return jax.shard_map(move, in_specs=(specs,), out_specs=specs, axis_names=free_axes())(tree)


def _balance(x: jax.Array, ways: int) -> jax.Array:
    """Sends this device's even chunk and its odd one. As 2c runs over the even chunks, so does one of the two that a
    device is to have; the other is odd."""
    even, odd = (
        jax.lax.ppermute(part, AXIS, [(c, _holder(2 * c + place, ways)) for c in range(ways)])
        for place, part in enumerate(jnp.split(x, 2, axis=1))
    )
    first_is_even = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.where(first_is_even, jnp.concatenate([even, odd], axis=1), jnp.concatenate([odd, even], axis=1))


def _holder(chunk: int, ways: int) -> int:
    return min(chunk, 2 * ways - 1 - chunk)


def token_index(device: jax.Array | int, length: int, ways: int) -> jax.Array:
    """Where in its row each of a device's `length` tokens stands, int32 [length]."""
    place, chunk = jnp.arange(length, dtype=jnp.int32), length // 2
    return place + jnp.where(place < chunk, device * chunk, (2 * ways - 2 - device) * chunk).astype(jnp.int32)


def row_order(length: int, ways: int) -> np.ndarray:
    """Where in a row of `length` the tokens of all devices stand, one device after the other."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * ways, -1)
    return np.stack([chunks[:ways], chunks[: ways - 1 : -1]], axis=1).reshape(-1)


def natural_order(x: jax.Array, ways: int) -> jax.Array:
    """The tokens of all devices one after the other, [B, C * T, ...], in the order of the row."""
    parts = x.reshape(x.shape[0], ways, 2, x.shape[1] // (2 * ways), *x.shape[2:])
    return jnp.concatenate([parts[:, :, 0], parts[:, ::-1, 1]], axis=1).reshape(x.shape)


def device_order(x: jax.Array, ways: int) -> jax.Array:
    """The inverse of `natural_order`."""
    parts = x.reshape(x.shape[0], 2, ways, x.shape[1] // (2 * ways), *x.shape[2:])
    return jnp.stack([parts[:, 0], parts[:, 1, ::-1]], axis=2).reshape(x.shape)
