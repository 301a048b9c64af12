"""Restore from the local tier: each process from its own copy, what it has lost from the processes that hold the same.

Along the `data` axis of a mesh every process group holds the same state, so a host whose disk is gone can be given its
part by another. All processes learn which pieces each of them holds, derive the same plan, read and check what the
plan asks of them, plan again without what proved damaged, and then broadcast what others lack. A step counts where
the pieces of all of them together cover all arrays, on this mesh or another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from maxlm.checkpoint import agreement, layout, leaves
from maxlm.checkpoint.leaves import Box, box_of
from maxlm.checkpoint.local_tier import Copy, LocalTier
from maxlm.checkpoint.pieces import Piece, assemble, box_from, cover, shaped, volume

_CHUNK_BYTES = 1 << 26

Claims = dict[Piece, set[int]]  # who holds it


class LocalSteps:
    """What the local copies of all processes hold together, and restore from it. Every process must call all alike."""

    def __init__(self, tier: LocalTier) -> None:
        self._copies, damaged = tier.copies()
        self.notes = [_set_aside(path, text) for path, text in damaged]
        own = [[copy.step, copy.start, [*copy.pieces]] for copy in self._copies]
        self._claims: dict[tuple[int, str], Claims] = {}  # (step, the start of the run that wrote it)
        for process, held in enumerate(agreement.gather(own)):
            for step, start, pieces in held:
                claims = self._claims.setdefault((step, start), {})
                for name, box in pieces:
                    claims.setdefault((name, box_from(box)), set()).add(process)
        self.steps = sorted({step for step, _ in self._claims}, reverse=True)

    def restore(self, step: int, target: Callable[[int, dict[str, Any]], Any]) -> tuple[dict[str, Any], Any] | None:
        """(meta, state) of `step`, or None where the copies do not cover it. target: as `verified.newest_good`'s."""
        for start in sorted(start for found, start in self._claims if found == step):
            copies = [copy for copy in self._copies if (copy.step, copy.start) == (step, start)]
            document = agreement.first_of(copies[0].document if copies else None)
            like = target(step, document["meta"])
            wanted = leaves.named_leaves(like)
            leaves.require_same(document["arrays"], leaves.index_of(wanted), f"the local checkpoint of step {step}")
            data = self._pieces(copies, self._claims[step, start], wanted)
            if data is not None:
                arrays = {name: _placed(name, leaf, data) for name, leaf in wanted.items()}
                return document["meta"], leaves.rebuild(like, arrays)
        return None

    def _pieces(
        self, copies: list[Copy], claims: Claims, wanted: Mapping[str, Any]
    ) -> dict[Piece, np.ndarray] | None:
        """The bytes of all pieces that this process needs; None where something is held by nobody."""
        me = jax.process_index()
        data: dict[Piece, np.ndarray] = {}
        needs = _needs(wanted)
        while True:
            plan = _plan(needs, claims)
            if plan is None:
                return None
            used, sends = plan
            mine = (used[me] & {piece for piece, holders in claims.items() if me in holders}) | {
                piece for piece, holder in sends if holder == me
            }
            bad = self._read(copies, mine - data.keys(), data)
            lost = agreement.gather(bad)
            if not any(lost):
                break
            for process, pieces in enumerate(lost):
                for name, box in pieces:
                    claims[name, box_from(box)].discard(process)
        _broadcast(sends, data, wanted)
        return data

    def _read(self, copies: list[Copy], pieces: Iterable[Piece], data: dict[Piece, np.ndarray]) -> list[Piece]:
        """Reads `pieces` into `data`; returns those that no copy holds unharmed, whose copies are set aside."""
        wanted, bad = sorted(pieces), []
        while wanted:
            holder = {piece: next((copy for copy in copies if piece in copy.pieces), None) for piece in wanted}
            bad += [piece for piece in wanted if holder[piece] is None]
            reads = [piece for piece in wanted if holder[piece] is not None]
            with ThreadPoolExecutor(min(len(reads), os.cpu_count() or 1, 16) or 1) as pool:
                found = pool.map(lambda piece, holder=holder: holder[piece].read(piece), reads)
                data |= {piece: part for piece, part in zip(reads, found, strict=True) if part is not None}
            wanted = [piece for piece in reads if piece not in data]
            for piece in wanted:  # another copy may have it unharmed
                if holder[piece] in copies:
                    copies.remove(holder[piece])
                    self.notes.append(_set_aside(holder[piece].path, f"{piece[0]} differs from its checksum"))
        return bad


def _needs(wanted: Mapping[str, Any]) -> list[set[Piece]]:
    """The boxes of every array that each process must have, by process."""
    needs: list[set[Piece]] = [set() for _ in range(jax.process_count())]
    for name, leaf in wanted.items():
        for device, index in leaf.sharding.devices_indices_map(tuple(leaf.shape)).items():
            needs[device.process_index].add((name, box_of(index, leaf.shape)))
    return needs


def _plan(needs: list[set[Piece]], claims: Claims) -> tuple[list[set[Piece]], list[tuple[Piece, int]]] | None:
    """([the pieces each process uses], [(piece, who broadcasts it)]), the same on all; None where some are nowhere."""
    by_name: dict[str, list[Box]] = {}
    for (name, box), holders in sorted(claims.items()):
        if holders:
            by_name.setdefault(name, []).append(box)
    chosen: dict[Piece, list[Box] | None] = {
        need: cover(need[1], by_name.get(need[0], [])) for need in set().union(*needs)
    }
    if None in chosen.values():
        return None
    used = [{(name, box) for name, need in process for box in chosen[name, need]} for process in needs]
    lacking = {piece for process, pieces in enumerate(used) for piece in pieces if process not in claims[piece]}
    return used, [(piece, min(claims[piece])) for piece in sorted(lacking)]


def _placed(name: str, leaf: Any, data: Mapping[Piece, np.ndarray]) -> jax.Array:
    """The array `leaf` describes, each shard put together from the pieces that this process has."""
    dtype, shape = np.dtype(leaf.dtype), tuple(leaf.shape)
    pieces = {box: part for (owner, box), part in data.items() if owner == name}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        need = box_of(index, shape)
        if need in pieces:
            return shaped(pieces[need], dtype, need)
        part = np.empty([stop - start for start, stop in need], dtype)
        for box in cover(need, sorted(pieces)) or ():
            assemble(part, need, box, shaped(pieces[box], dtype, box))
        return part

    return jax.make_array_from_callback(shape, leaf.sharding, shard)


def _broadcast(
    sends: list[tuple[Piece, int]], data: dict[Piece, np.ndarray], wanted: Mapping[str, Any]
) -> None:
    """Gives every process the pieces in `sends`, as bytes: a sum of floats with zeros would turn -0.0 into 0.0."""
    from jax.experimental import multihost_utils

    me = jax.process_index()
    for holder in sorted({holder for _, holder in sends}):
        pieces = [piece for piece, sender in sends if sender == holder]
        sizes = [volume(box) * np.dtype(wanted[name].dtype).itemsize for name, box in pieces]
        stream = np.concatenate([data[piece] for piece in pieces]) if me == holder else np.empty(sum(sizes), np.uint8)
        chunk = min(_CHUNK_BYTES, 1 << (stream.size - 1).bit_length())
        for start in range(0, stream.size, chunk):
            part = np.zeros(chunk, np.uint8)
            here = stream[start : start + chunk]
            part[: here.size] = here if me == holder else 0
            got = np.asarray(multihost_utils.broadcast_one_to_all(part, is_source=me == holder))
            stream[start : start + chunk] = got[: here.size]
        for piece, part in zip(pieces, np.split(stream, np.cumsum(sizes)[:-1]), strict=True):
            data.setdefault(piece, part)


def _set_aside(path: Any, text: str) -> str:
    try:
        where = f"set aside as {layout.set_aside(path).name}"
    except layout.CheckpointError:  # another process, which sees the same folder, did it
        where = "set aside"
    return f"local checkpoint {path.parent.name}/{path.name} is damaged ({text}): {where}"
