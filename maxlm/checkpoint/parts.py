"""What one process writes into an object store, and how processes read it again: pieces in objects of bounded size.

A process's shards of all arrays, one after another, raw, are its stream; objects are OBJECT_BYTES of it each, so that
many are written and read at a time, small arrays share one, and large ones span several. Every object has its CRC-32,
compared before anything of it is used.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from maxlm.checkpoint import pieces
from maxlm.checkpoint.layout import IntegrityError
from maxlm.checkpoint.leaves import Box, aligned_empty
from maxlm.checkpoint.object_store import Objects

OBJECT_BYTES = 1 << 26
AT_ONCE = 16  # objects that a process reads or writes at a time


@dataclass
class Part:
    """What one process wrote: objects' (bytes, crc32), and where in their stream (offset, bytes) each piece is."""

    objects: list[tuple[int, int]]
    pieces: dict[str, dict[Box, tuple[int, int]]]
    starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = [0, *accumulate(size for size, _ in self.objects)]

    def cuts(self, offset: int, size: int) -> Iterator[tuple[int, slice, slice]]:
        """(object, the part of it, the part of the piece) for the piece at `offset`."""
        at = offset
        while at < offset + size:
            number = bisect_right(self.starts, at) - 1
            first = self.starts[number]
            end = min(offset + size, self.starts[number + 1])
            yield number, slice(at - first, end - first), slice(at - offset, end - offset)
            at = end


@dataclass
class Commit:
    """What commit.json of the checkpoint `root` says."""

    root: str
    time: float
    document: dict[str, Any]
    parts: list[Part]

    def objects(self) -> list[tuple[int, int]]:
        return [(process, number) for process, part in enumerate(self.parts) for number in range(len(part.objects))]


def write_part(
    objects: Objects, root: str, process: int, held: list[tuple[pieces.Piece, np.ndarray]]
) -> dict[str, Any]:
    """Writes what `process` holds; returns its table, for commit.json."""
    flat = [pieces.as_bytes(array) for _, array in held]
    offsets = accumulate((data.size for data in flat), initial=0)
    table = [[name, box, at, data.size] for ((name, box), _), data, at in zip(held, flat, offsets, strict=False)]

    def write(numbered: tuple[int, list[np.ndarray]]) -> tuple[int, int]:
        number, views = numbered
        data = b"".join(views)
        objects.write(key_of(root, process, number), data)
        return len(data), zlib.crc32(data)

    return {"objects": list(in_order(write, enumerate(_cut(flat, OBJECT_BYTES)))), "pieces": table}


def check(objects: Objects, commit: Commit) -> None:
    """Reads every object. Raises IntegrityError where one is not what was written."""
    deque(in_order(lambda key: len(read_object(objects, commit, *key)), commit.objects()), maxlen=0)


def read_object(objects: Objects, commit: Commit, process: int, number: int) -> bytes:
    """Raises IntegrityError where it is not what was written."""
    key = key_of(commit.root, process, number)
    name, (size, crc) = key.partition("/")[2], commit.parts[process].objects[number]
    data = objects.read(key)
    if data is None:
        raise IntegrityError(f"{name} is missing")
    if len(data) != size:
        raise IntegrityError(f"{name} has {len(data)} bytes instead of {size}")
    if zlib.crc32(data) != crc:
        raise IntegrityError(f"{name} differs from its checksum")
    return data

def read(
    objects: Objects, commit: Commit, index: Mapping[str, list[Any]], boxes: Mapping[str, set[Box]]
) -> Iterator[tuple[str, dict[Box, np.ndarray]]]:
    """Each array's boxes as soon as its objects are there; every object is read once."""
    covers = {name: _covers(commit, name, boxes[name]) for name in index}
    cuts: dict[tuple[int, int], list[tuple[str, Box, int, slice, slice]]] = {}
    left = dict.fromkeys(index, 0)
    for name, cover in covers.items():
        for box in {box for chosen in cover.values() for box in chosen}:
            process, (offset, size) = _holder(commit, name, box)
            for number, source, target in commit.parts[process].cuts(offset, size):
                cuts.setdefault((process, number), []).append((name, box, size, source, target))
                left[name] += 1
    buffers: dict[str, dict[Box, np.ndarray]] = {name: {} for name in index}
    wanted = sorted(cuts)
    found = in_order(lambda key: read_object(objects, commit, *key), wanted)
    for key, data in zip(wanted, found, strict=True):
        view = np.frombuffer(data, np.uint8)
        for name, box, size, source, target in cuts.pop(key):
            if box not in buffers[name]:
                buffers[name][box] = aligned_empty([size], np.dtype(np.uint8))
            buffers[name][box][target] = view[source]
            left[name] -= 1
            if not left[name]:
                yield name, _assembled(np.dtype(index[name][0]), covers[name], buffers.pop(name))


def _assembled(dtype: np.dtype, covers: dict[Box, list[Box]], held: dict[Box, np.ndarray]) -> dict[Box, np.ndarray]:
    parts = {}
    for need, chosen in covers.items():
        if chosen == [need]:
            parts[need] = pieces.shaped(held[need], dtype, need)
            continue
        parts[need] = aligned_empty([stop - start for start, stop in need], dtype)
        for box in chosen:
            pieces.assemble(parts[need], need, box, pieces.shaped(held[box], dtype, box))
    return parts


def _covers(commit: Commit, name: str, needs: Iterable[Box]) -> dict[Box, list[Box]]:
    there = sorted({box for part in commit.parts for box in part.pieces.get(name, ())})
    covers = {need: pieces.cover(need, there) for need in needs}
    if None in covers.values():
        raise IntegrityError(f"parts of {name} are nowhere")
    return covers


def _holder(commit: Commit, name: str, box: Box) -> tuple[int, tuple[int, int]]:
    return next((process, part.pieces[name][box]) for process, part in enumerate(commit.parts)
                if box in part.pieces.get(name, ()))


def part_from(values: dict[str, Any]) -> Part:
    table: dict[str, dict[Box, tuple[int, int]]] = {}
    for name, box, offset, size in values["pieces"]:
        table.setdefault(name, {})[pieces.box_from(box)] = offset, size
    return Part([(size, crc) for size, crc in values["objects"]], table)


def key_of(root: str, process: int, number: int) -> str:
    return f"{root}/process_{process}/{number:05d}"


def _cut(flat: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """The bytes of `flat`, one after another, in runs of `size`: views, nothing is copied."""
    run, room = [], size
    for data in flat:
        while data.size:
            head, data = data[:room], data[room:]
            run.append(head)
            room -= head.size
            if not room:
                yield run
                run, room = [], size
    if run:
        yield run


def in_order(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map` with AT_ONCE calls in flight in threads; it does not run further ahead of its consumer."""
    waiting: deque[Any] = deque()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= AT_ONCE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
