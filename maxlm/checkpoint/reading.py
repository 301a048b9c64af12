"""Reads the arrays that Orbax wrote, onto devices or into numpy, with TensorStore itself.

Orbax's own restore lets TensorStore allocate each array and then copies it to where JAX wants it. Here TensorStore
writes into memory that a CPU backend takes over as it is and a GPU's driver copies from, and no process waits for
another: docs/RESILIENCE.md has what that is worth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxlm.checkpoint import layout, leaves
from maxlm.checkpoint.leaves import Box

_AHEAD_BYTES = 4 << 30  # of host memory that is being read into while what came before is placed


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


def read_folder(
    path: Path, index: Mapping[str, list[Any]], boxes: Mapping[str, Iterable[Box]]
) -> Iterable[tuple[str, dict[Box, np.ndarray]]]:
    """Each array's boxes, in order, from what Orbax wrote at `path`, with later ones under way while an earlier one is
    in the caller's hands."""
    import tensorstore as ts

    base = {"driver": "ocdbt", "base": f"file://{path / layout.STATE_ITEM}/"}
    context = ts.Context()
    waiting: deque[tuple[str, dict[Box, np.ndarray], list[Any]]] = deque()
    ahead = 0
    try:
        stores = {
            # A chunk that is missing is an error, not an array of zeros.
            name: ts.open({"driver": "zarr", "kvstore": {**base, "path": name}, "fill_missing_data_reads": False},
                          open=True, read=True, context=context)
            for name in index
        }
        for name, (dtype, _) in index.items():
            store = stores[name].result()
            parts = {
                box: leaves.aligned_empty([stop - start for start, stop in box], np.dtype(dtype))
                for box in boxes[name]
            }
            reads = [
                ts.array(part).write(store[tuple(slice(start, stop) for start, stop in box)].translate_to[0])
                for box, part in parts.items()
            ]
            waiting.append((name, parts, reads))
            ahead += sum(part.nbytes for part in parts.values())
            while ahead > _AHEAD_BYTES:
                ahead -= sum(part.nbytes for part in waiting[0][1].values())
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    except ValueError as error:  # as TensorStore reports everything
        raise layout.unreadable(path, error) from error


def _finished(name: str, parts: dict[Box, np.ndarray], reads: list[Any]) -> tuple[str, dict[Box, np.ndarray]]:
    for read in reads:
        read.result()
    return name, parts
