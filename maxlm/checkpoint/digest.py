"""SHA-256 of a checkpoint's parameters: the same for every mesh, process count and storage layout."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from maxlm.checkpoint import verified
from maxlm.checkpoint.durable import opened, require_step

_READ_BYTES = 1 << 30  # host memory that one read of several arrays may take (a single larger array takes its own)


def tree_digest(directory: str | os.PathLike[str], step: int | None = None) -> str:
    """Hex SHA-256 over the arrays under 'params/' of `step` (None: the newest complete checkpoint).

    For each array in sorted order of its name: the line 'NAME DTYPE SHAPE\\n' in UTF-8, for instance
    'params/embedding/table float32 [4096, 192]', then its raw bytes, C order, little-endian.
    Reads on the host, in pieces of about 1 GiB, and needs no config. Raises CheckpointError, IntegrityError.
    """
    durable, step = opened(directory), require_step(directory, step)
    with verified.intact(durable, step):
        saved = durable.document(step)["arrays"]
        index = {name: entry for name, entry in saved.items() if name.startswith("params/")}
        return _hash(item for names in _groups(index) for item in sorted(durable.arrays(step, names).items()))


def array_digest(arrays: Mapping[str, Any]) -> str:
    """`tree_digest` of named arrays in memory (`named_leaves({'params': params})`); they must be fully addressable."""
    return _hash((name, np.asarray(arrays[name])) for name in sorted(arrays))


def _hash(items: Iterable[tuple[str, np.ndarray]]) -> str:
    digest = hashlib.sha256()
    for name, array in items:
        digest.update(f"{name} {array.dtype.name} {list(array.shape)}\n".encode())
        # Every platform JAX runs on is little-endian, so memory order is file order.
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _groups(index: Mapping[str, list[Any]]) -> Iterator[list[str]]:
    """Names in sorted order, in runs of about _READ_BYTES."""
    group: list[str] = []
    size = 0
    for name in sorted(index):
        dtype, shape = index[name]
        array_bytes = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        if group and size + array_bytes > _READ_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += array_bytes
    if group:
        yield group
