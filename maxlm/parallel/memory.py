"""Arrays that wait in the memory of their accelerator's host (pinned, so that the device itself reads it).

Nothing is computed there: `on_device` brings arrays back, inside a compiled step at the time they are used.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding

HOST = "pinned_host"


def on_device(tree: Any) -> Any:
    """The arrays of `tree` in their devices' memory; those that are there stay. For use inside `jax.jit`."""
    return jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Device) if _on_host(a) else a, tree)


def like(before: Any, tree: Any) -> Any:
    """The arrays of `tree` in the memories where those of `before`, of the same structure, are."""
    return jax.tree.map(lambda a, now: jax.device_put(now, jax.memory.Space.Host) if _on_host(a) else now, before, tree)


def any_on_host(tree: Any) -> bool:
    return any(map(_on_host, jax.tree.leaves(tree)))


def _on_host(a: jax.Array) -> bool:
    return jax.typeof(a).memory_space == jax.memory.Space.Host


def on_host(shardings: Any) -> Any:
    """The same layouts in the host's memory; scalars stay."""
    return jax.tree.map(lambda s: s.with_memory_kind(HOST) if s.spec else s, shardings,
                        is_leaf=lambda s: isinstance(s, NamedSharding))


def has_host_memory(device: jax.Device) -> bool:
    """Whether `device`, which need not be attached, can read its host's memory."""
    return HOST in {memory.kind for memory in device.addressable_memories()}
