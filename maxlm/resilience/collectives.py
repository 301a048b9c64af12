"""Which collectives a compiled program holds, in order and by mesh axis, read from its HLO text.

JAX does not tell which collective a device is in. What can be known of a program that hangs is the list of those that
it may be in: text order is the order in which XLA scheduled them within one computation (a loop's body is one).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_OPERATION = re.compile(rf" = (?P<type>.+?) (?P<kind>{_KINDS})(-start)?\(")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
# Three ways of writing groups of devices: {{0,1},{2,3}}; [2,2]<=[2,2]T(1,0), rows of a transposed count; and
# mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, along an axis of XLA's own mesh.
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(?P<groups>\{[\d,{} ]*\})\}")
_COUNTED = re.compile(r"replica_groups=\[(?P<shape>[\d,]+)\]<=\[(?P<base>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]+)\]"
    r"(?:, device_ids=\(\[(?P<base>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))? \{(?P<along>[^}]*)\}"
)
_SOURCE = re.compile(r'op_name="(?P<name>[^"]*)"')


def collectives(hlo: str, axes: Mapping[str, int]) -> list[dict[str, Any]]:
    """One dict a collective: `kind`, `over` (the mesh axes it crosses), `type` of its result, `source` (the JAX
    operation it came from), `computation` (where it is, 'ENTRY' for the program itself).

    axes: sizes of the mesh's axes, in the order in which the mesh numbers its devices. A collective among a single
    device each is left out.
    """
    found, computation = [], ""
    for line in hlo.splitlines():
        if opening := _COMPUTATION.match(line):
            computation = "ENTRY" if opening["entry"] else opening["name"]
        if not (operation := _OPERATION.search(line)):
            continue
        over = _crossed(line, axes)
        if over:
            source = _SOURCE.search(line)
            found.append({"kind": operation["kind"], "over": over, "type": operation["type"],
                          "source": source["name"] if source else "", "computation": computation})
    return found


def _crossed(line: str, axes: Mapping[str, int]) -> list[str]:
    """The axes along which the members of a group differ."""
    sizes = list(axes.values())
    crossed: set[str] = set()
    for group in _groups(line, math.prod(sizes)):
        places = [_place(device, sizes) for device in group]
        crossed |= {name for name, along in zip(axes, zip(*places, strict=True), strict=True) if len(set(along)) > 1}
    return [name for name in axes if name in crossed]


def _groups(line: str, count: int) -> Iterable[list[int]]:
    if listed := _LISTED.search(line):
        return [_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", listed["groups"])]
    if counted := _COUNTED.search(line):
        _, width = _numbers(counted["shape"])
        devices = _transposed(_numbers(counted["base"]), counted["order"])
        return [devices[first : first + width] for first in range(0, len(devices), width)]
    if mesh := _MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh["sizes"])}
        devices = _transposed(_numbers(mesh["base"] or str(count)), mesh["order"])
        along = set(re.findall(r"'([^']+)'", mesh["along"]))
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, device in zip(itertools.product(*map(range, sizes.values())), devices, strict=True):
            fixed = tuple(at for name, at in zip(sizes, place, strict=True) if name not in along)
            groups.setdefault(fixed, []).append(device)
        return groups.values()
    return [list(range(count))]


def _transposed(base: list[int], order: str | None) -> list[int]:
    """The numbers from 0 on in the shape `base`, transposed to `order`, flat."""
    axes = _numbers(order) if order else range(len(base))
    strides = [math.prod(base[axis + 1 :]) for axis in range(len(base))]
    places = itertools.product(*(range(base[axis]) for axis in axes))
    return [sum(strides[axis] * at for axis, at in zip(axes, place, strict=True)) for place in places]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _place(device: int, sizes: list[int]) -> list[int]:
    place = []
    for size in reversed(sizes):
        device, along = divmod(device, size)
        place.append(along)
    return place[::-1]
