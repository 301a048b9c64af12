"""Arrays that wait in the memory of their accelerator's host (pinned, so that the device itself reads it).

Nothing is computed there: `on_device` brings arrays back, inside a compiled step at the time they are used.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding

HOST = "pinned_host"


def on_device(tree: Any, after: jax.Array | None = None) -> Any:
    """The arrays of `tree` in their devices' memory; those that are there stay. For use inside `jax.jit`.

    after: a value without which none is fetched, so that they do not fill the memory that others still need.
    """

    def one(a: jax.Array) -> jax.Array:
        if jax.typeof(a).memory_space != jax.memory.Space.Host:
            return a
        if after is not None:
            a, _ = jax.lax.optimization_barrier((a, after))
        return jax.device_put(a, jax.memory.Space.Device)

    return jax.tree.map(one, tree)


def on_host(shardings: Any) -> Any:
    """The same layouts in the host's memory; scalars stay."""
    return jax.tree.map(lambda s: s.with_memory_kind(HOST) if s.spec else s, shardings,
                        is_leaf=lambda s: isinstance(s, NamedSharding))


def has_host_memory(device: jax.Device) -> bool:
    """Whether `device`, which need not be attached, can read its host's memory."""
    return HOST in {memory.kind for memory in device.addressable_memories()}
