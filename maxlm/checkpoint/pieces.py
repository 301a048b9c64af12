"""Pieces: an array's parts as raw bytes, as processes hold and write them, and how parts cover other parts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from maxlm.checkpoint.leaves import Box, box_of

Piece = tuple[str, Box]  # which array, which part of it


def on_host(arrays: Mapping[str, Any], *, first_copy_only: bool = False) -> list[tuple[Piece, np.ndarray]]:
    """Every distinct shard that this process holds; with `first_copy_only` those that no lower replica holds, so that
    all processes together hold each once. On a CPU these are views: JAX does not donate what is viewed."""
    shards: dict[Piece, Any] = {}
    for name, array in arrays.items():
        if not isinstance(array, jax.Array):
            if jax.process_index() == 0 or not first_copy_only:
                shards[name, whole(array.shape)] = array
            continue
        for shard in array.addressable_shards:
            piece = name, box_of(shard.index, array.shape)
            if piece not in shards and not (first_copy_only and shard.replica_id):
                shards[piece] = shard.data
                shard.data.copy_to_host_async()
    return [(piece, np.asarray(data)) for piece, data in shards.items()]


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The array's bytes, C order; a view where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def shaped(data: np.ndarray, dtype: np.dtype, box: Box) -> np.ndarray:
    """The part that the bytes `data` are."""
    return data.view(dtype).reshape([stop - start for start, stop in box])


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def box_from(values: Any) -> Box:
    """The box that JSON made lists of."""
    return tuple((start, stop) for start, stop in values)


def cover(need: Box, boxes: Sequence[Box]) -> list[Box] | None:
    """Of `boxes`, `need` itself or disjoint ones that fill it; None where they do not."""
    if need in boxes:
        return [need]
    chosen: list[Box] = []
    for box in boxes:
        if volume(common(box, need)) and not any(volume(common(box, other)) for other in chosen):
            chosen.append(box)
    return chosen if sum(volume(common(box, need)) for box in chosen) == volume(need) else None


def tiles(need: Box, boxes: Collection[Box]) -> list[Box] | None:
    """Of `boxes`, no two of which overlap, those that have some of `need`; None where they do not fill it."""
    if need in boxes:
        return [need]
    chosen = [box for box in boxes if volume(common(box, need))]
    return chosen if sum(volume(common(box, need)) for box in chosen) == volume(need) else None


def common(one: Box, other: Box) -> Box:
    return tuple((max(a, c), max(a, c, min(b, d))) for (a, b), (c, d) in zip(one, other, strict=True))


def volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def assemble(out: np.ndarray, need: Box, box: Box, part: np.ndarray) -> None:
    """Copies what the part `box` of an array has of `need` into `out`, which is that part."""
    shared = common(box, need)
    out[_slices(shared, need)] = part[_slices(shared, box)]


def _slices(box: Box, inside: Box) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, inside, strict=True))
