"""What one process writes into an object store, and how processes read it again: pieces in objects of bounded size.

A process's shards of all arrays, one after another, raw, are its stream; objects are OBJECT_BYTES of it each, so that
many are written and read at a time, small arrays share one, and large ones span several. Every object has its CRC-32,
compared before anything of it is used.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from maxlm.checkpoint import pieces
from maxlm.checkpoint.gather import Cut, Target, gather, in_order
from maxlm.checkpoint.layout import IntegrityError
from maxlm.checkpoint.leaves import Box
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

    return {"objects": list(in_order(write, enumerate(_cut(flat, OBJECT_BYTES)), at_once=AT_ONCE)), "pieces": table}


def check(objects: Objects, commit: Commit) -> None:
    """Reads every object. Raises IntegrityError where one is not what was written."""
    looked = in_order(lambda key: len(read_object(objects, commit, *key)), commit.objects(), at_once=AT_ONCE)
    deque(looked, maxlen=0)


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
    covers: dict[str, dict[Box, list[Box]]] = {}
    units: dict[tuple[int, int], list[Cut]] = {}  # one array after another, so that few are held half-read
    for name in index:
        held = _held(commit, name)
        covers[name] = _covers(name, boxes[name], held)
        for box in sorted({box for chosen in covers[name].values() for box in chosen}, key=held.__getitem__):
            process, (offset, size) = held[box]
            for number, source, target in commit.parts[process].cuts(offset, size):
                units.setdefault((process, number), []).append(Cut(name, box, size, source, target))

    def fetch(unit: tuple[int, int], targets: list[Target]) -> None:
        data = np.frombuffer(read_object(objects, commit, *unit), np.uint8)
        for source, target in targets:
            target[:] = data[source]

    with closing(gather(index, covers, units, fetch, at_once=AT_ONCE)) as arrays:
        yield from arrays


def _held(commit: Commit, name: str) -> dict[Box, tuple[int, tuple[int, int]]]:
    """Who wrote each piece of an array, and where in its stream."""
    return {box: (process, place) for process, part in enumerate(commit.parts)
            for box, place in part.pieces.get(name, {}).items()}


def _covers(name: str, needs: Iterable[Box], held: Mapping[Box, Any]) -> dict[Box, list[Box]]:
    covers = {need: pieces.tiles(need, held) for need in needs}
    if None in covers.values():
        raise IntegrityError(f"parts of {name} are nowhere")
    return covers


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
