"""Reads the arrays that Orbax wrote straight from its files, comparing checksums on the way.

OCDBT keeps chunks of uncompressed arrays as they are, one after another, in a few files, beside a tree that says which
is where. TensorStore tells what the tree says (`tensorstore.ocdbt.dump`); the bytes are then read as the manifest's
blocks are summed up, so that each is read once, into the memory where JAX takes it over. Reading through TensorStore's
arrays takes a copy of its own and needs a second pass for the checksums: docs/RESILIENCE.md has what that is worth.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxlm.checkpoint import integrity, layout, pieces
from maxlm.checkpoint.gather import Cut, Target, gather
from maxlm.checkpoint.layout import IntegrityError
from maxlm.checkpoint.leaves import Box

_READ_BYTES = 1 << 20  # what stays in the cache between the read and the checksum
_AT_ONCE = min(max(os.cpu_count() or 1, 4), 16)
_IN_TREE = ("", 0)  # the unit of the chunks that are so small that the tree itself holds them


class Chunk(NamedTuple):
    """`size` bytes of `file` (of the tree's own where it is empty) from `offset` on."""

    file: str
    offset: int
    size: int


@dataclass
class Table:
    """Where every chunk is: by array, by the box it is; in_tree: the bytes of those that the tree holds."""

    arrays: dict[str, dict[Box, Chunk]] = field(default_factory=dict)
    in_tree: bytes = b""


def table(path: Path) -> Table:
    """Of the checkpoint at `path`. Raises IntegrityError where it cannot be read."""
    import tensorstore as ts

    found, described, values = Table(), {}, {}
    try:
        base = ts.KvStore.open(f"file://{path / layout.STATE_ITEM}/").result()
        root = ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]
        for key, entry in _entries(ts, base, root, b""):
            name, _, last = key.decode().rpartition("/")
            if last == ".zarray":
                described[name] = json.loads(entry["inline_value"])
            else:
                values.setdefault(name, {})[last] = entry
        for name, meta in described.items():
            plain = [meta["zarr_format"], meta["compressor"], meta["filters"], meta["order"], meta["dtype"][:1] == ">"]
            if plain != [2, None, None, "C", False]:
                raise ValueError(f"{name} is not stored as plain bytes")
            boxes = found.arrays[name] = {}
            for number, entry in values.get(name, {}).items():
                indices = map(int, number.split(".")) if meta["chunks"] else ()
                box = tuple((i * size, (i + 1) * size) for i, size in zip(indices, meta["chunks"], strict=True))
                if "inline_value" in entry:
                    boxes[box] = Chunk("", len(found.in_tree), len(entry["inline_value"]))
                    found.in_tree += entry["inline_value"]
                else:
                    _, folder, file, offset, size = entry["indirect_value"].split(":")
                    boxes[box] = Chunk(f"{layout.STATE_ITEM}/{folder}{file}", int(offset), int(size))
    except (ValueError, KeyError, TypeError, IndexError) as error:  # TensorStore reports everything as ValueError
        raise layout.unreadable(path, error) from error
    return found


def _entries(ts: Any, base: Any, location: str, prefix: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(key, entry) of every leaf below the node at `location`, whose keys lack `prefix`."""
    node = ts.ocdbt.dump(base, location).result()
    for entry in node["entries"]:
        if node["height"]:
            yield from _entries(ts, base, entry["location"], prefix + entry["subtree_common_prefix"])
        else:
            yield prefix + entry["key"], entry


def read(
    path: Path, found: Table, index: Mapping[str, list[Any]], boxes: Mapping[str, set[Box]],
    share: tuple[int, int] = integrity.NO_ARRAYS,
) -> Iterator[tuple[str, dict[Box, np.ndarray]]]:
    """Each array's boxes, when all blocks that hold some of it have been read and agree with their checksums.

    share: (i, n) also checks every nth block from the ith on, needed or not. Raises IntegrityError where one differs,
    CheckpointError where a file may not be read.
    """
    files, size = integrity.read_manifest(path), integrity.BLOCK_BYTES
    covers: dict[str, dict[Box, list[Box]]] = {}
    units: dict[tuple[str, int], list[Cut]] = {}  # one array after another, so that few are held half-read
    for name, (dtype, _) in index.items():
        chunks = found.arrays.get(name, {})
        covers[name] = _covers(name, np.dtype(dtype), boxes[name], chunks)
        for box in sorted({box for chosen in covers[name].values() for box in chosen}, key=chunks.__getitem__):
            for unit, cut in _cuts(name, box, chunks[box], size):
                units.setdefault(unit, []).append(cut)
    for block in integrity.blocks(files, share):
        units.setdefault(block, [])

    def fetch(unit: tuple[str, int], targets: list[Target]) -> None:
        if unit == _IN_TREE:
            for source, target in targets:
                target[:] = np.frombuffer(found.in_tree, np.uint8)[source]
        elif damage := integrity.looked_at(path, lambda: _read_block(path, files, *unit, targets)):
            raise IntegrityError(damage)

    with closing(gather(index, covers, units, fetch, at_once=_AT_ONCE)) as arrays:
        yield from arrays


def _cuts(name: str, box: Box, chunk: Chunk, block_bytes: int) -> Iterator[tuple[tuple[str, int], Cut]]:
    """The blocks that a chunk lies in, and what each has of it."""
    end = chunk.offset + chunk.size
    if not chunk.file:
        yield _IN_TREE, Cut(name, box, chunk.size, slice(chunk.offset, end), slice(0, chunk.size))
        return
    for number in range(chunk.offset // block_bytes, -(-end // block_bytes)):
        start = number * block_bytes
        first, last = max(chunk.offset, start), min(end, start + block_bytes)
        source, target = slice(first - start, last - start), slice(first - chunk.offset, last - chunk.offset)
        yield (chunk.file, number), Cut(name, box, chunk.size, source, target)


def _covers(name: str, dtype: np.dtype, needs: set[Box], chunks: Mapping[Box, Chunk]) -> dict[Box, list[Box]]:
    covers = {need: pieces.tiles(need, chunks) for need in needs}
    for chosen in covers.values():
        if chosen is None or any(chunks[box].size != pieces.volume(box) * dtype.itemsize for box in chosen):
            raise IntegrityError(f"chunks of {name} are missing or of another size")
    return covers


def _read_block(
    path: Path, files: Mapping[str, tuple[int, list[int]]], name: str, number: int, targets: list[Target]
) -> str | None:
    """Reads block `number` of the file `name` into `targets`; what is damaged, or None."""
    if name not in files:
        raise IntegrityError(f"{name} is not in {integrity.MANIFEST_FILE}")
    size, sums = files[name]
    first = number * integrity.BLOCK_BYTES
    length = min(integrity.BLOCK_BYTES, size - first)
    crc, at, scratch = 0, 0, memoryview(b"")
    descriptor = os.open(path / name, os.O_RDONLY)
    try:
        for source, target in [*sorted(targets, key=lambda item: item[0].start), (slice(length, length), None)]:
            if at < source.start and not scratch:
                scratch = memoryview(bytearray(min(_READ_BYTES, length)))
            while at < source.stop:
                if at < source.start:  # nothing that is needed, but summed up with the rest
                    view = scratch[: source.start - at]
                else:
                    view = memoryview(target)[at - source.start :][:_READ_BYTES]
                count = os.preadv(descriptor, [view], first + at)
                if not count:
                    return f"{name} ends at byte {first + at}"
                crc, at = zlib.crc32(view[:count], crc), at + count
    finally:
        os.close(descriptor)
    return None if crc == sums[number] else integrity.differs(name, number, size)
