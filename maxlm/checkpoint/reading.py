"""What a checkpoint holds, onto devices or into numpy, whatever it is read from.

The bytes are read into memory that a CPU backend takes over as it is and a GPU's driver copies from, and no process
waits for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from maxlm.checkpoint import leaves
from maxlm.checkpoint.leaves import Box

# Of arrays (name -> [dtype, shape]), the boxes asked for: yields each array's, in order. Raises IntegrityError.
Reader = Callable[[Mapping[str, list[Any]], Mapping[str, set[Box]]], Iterable[tuple[str, dict[Box, np.ndarray]]]]


def restore_like(document: Mapping[str, Any], where: str, like: Any, read: Reader) -> Any:
    """The arrays of the checkpoint that `document` describes and `read` reads, placed as `like` says; each process
    reads its own shards. where: the checkpoint's name in messages.

    like: pytree of jax.ShapeDtypeStruct with a concrete NamedSharding each, on any mesh; it need not be the whole
    saved state: top-level entries that it lacks altogether are not read (evaluation restores 'params' alone).
    Raises CheckpointError where names, shapes or dtypes differ, IntegrityError where the files cannot be read.
    """
    wanted = leaves.named_leaves(like)
    for name, leaf in wanted.items():
        if not isinstance(getattr(leaf, "sharding", None), jax.sharding.Sharding):
            raise ValueError(f"restore target {name!r} needs a concrete sharding, got {leaf}")
    sections = {name.split("/")[0] for name in wanted}
    saved = {n: e for n, e in document["arrays"].items() if n.split("/")[0] in sections}
    leaves.require_same(saved, leaves.index_of(wanted), where)
    boxes = {
        name: {leaves.box_of(index, leaf.shape) for index in _local_indices(leaf)} for name, leaf in wanted.items()
    }
    placed = {}
    for name, parts in read(leaves.index_of(wanted), boxes):
        leaf = wanted[name]
        placed[name] = jax.make_array_from_callback(
            tuple(leaf.shape), leaf.sharding,
            lambda index, parts=parts, shape=leaf.shape: parts[leaves.box_of(index, shape)],
        )
    return leaves.rebuild(like, placed)


def restore_numpy(document: Mapping[str, Any], names: Iterable[str], read: Reader) -> dict[str, np.ndarray]:
    """The named arrays of the checkpoint that `document` describes, whole, in host memory. Raises IntegrityError."""
    saved = document["arrays"]
    index = {name: saved[name] for name in names}
    whole = {name: {tuple((0, size) for size in shape)} for name, (_, shape) in index.items()}
    return {name: next(iter(parts.values())) for name, parts in read(index, whole)}


def _local_indices(leaf: Any) -> Iterable[tuple[slice, ...]]:
    return leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape)).values()
