"""Any pytree <-> a flat dict of arrays under stable readable names, free of NNX and Optax classes.

'params/layers_0/attention/q_proj', 'opt_state/1/0/mu/layers_0/attention/q_proj', 'step'. A module may be
wrapped, an optimizer's class renamed, and its checkpoints still restore as long as the names stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from maxlm.checkpoint.layout import CheckpointError

Box = tuple[tuple[int, int], ...]  # [start, stop) along each dim: a part of an array


def named_leaves(tree: Any) -> dict[str, Any]:
    """Name -> leaf, in the tree's own order. Raises ValueError where two leaves would share a name."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = leaf_name(path)
        if name in named:
            raise ValueError(f"two leaves of the state are called {name!r}: rename one of them")
        named[name] = leaf
    return named


def leaf_name(path: tuple[Any, ...]) -> str:
    """'a/b/0' for a key path; the `.value` by which an nnx.Variable holds its array is not part of the name."""
    if len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in path)


def rebuild(like: Any, named: Mapping[str, Any]) -> Any:
    """`like` with each leaf replaced by `named`'s of the same name."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(treedef, [named[leaf_name(path)] for path, _ in paths])


def plain_arrays(tree: Any) -> dict[str, Any]:
    """Name -> jax.Array, or a numpy copy of anything else, as it will be written.

    Raises CheckpointError for a leaf that Orbax cannot hold: a typed PRNG key (keep `jax.random.key_data` of it),
    text or another object, an array without elements.
    """
    arrays = {}
    for name, leaf in named_leaves(tree).items():
        if not isinstance(leaf, jax.Array):
            leaf = np.array(leaf)  # a copy: the caller may overwrite its own at once
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) or leaf.dtype.kind in "OUS" or not leaf.size:
            raise CheckpointError(
                f"state leaf {name!r}, {leaf.dtype} of shape {leaf.shape}, cannot be saved: keep plain numbers only"
            )
        arrays[name] = leaf
    return arrays


def index_of(arrays: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Name -> [dtype name, shape], ready for JSON. Takes arrays or jax.ShapeDtypeStruct."""
    return {name: [np.dtype(leaf.dtype).name, list(leaf.shape)] for name, leaf in arrays.items()}


def require_same(saved: Mapping[str, list[Any]], wanted: Mapping[str, list[Any]], where: str) -> None:
    """Raises CheckpointError, with the first differences, where what is saved at `where` is not what is wanted."""
    found = _differences(saved, wanted)
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise CheckpointError(
            f"{where} holds another state than this config builds: {'; '.join(found[:3])}{more}: "
            "restore with the config it was saved with"
        )


def _differences(saved: Mapping[str, list[Any]], wanted: Mapping[str, list[Any]]) -> list[str]:
    """What would not restore, one phrase an array: missing, unexpected, or of another dtype or shape."""
    found = []
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved:
            found.append(f"{name} is missing from the checkpoint")
        elif name not in wanted:
            found.append(f"{name} is in the checkpoint only")
        elif saved[name] != wanted[name]:
            found.append(f"{name} is {_describe(saved[name])} in the checkpoint, {_describe(wanted[name])} here")
    return found


def _describe(entry: list[Any]) -> str:
    dtype, shape = entry
    return f"{dtype}{shape}"


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """The part of an array of `shape` that `index` (of a shard or of a sharding) selects."""
    return tuple((part.indices(size)[0], part.indices(size)[1]) for part, size in zip(index, shape, strict=True))


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array to be filled, at a multiple of 64 bytes: a CPU backend takes it over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 63, np.uint8)
    first = -buffer.ctypes.data % 64
    return buffer[first : first + size].view(dtype).reshape(shape)
