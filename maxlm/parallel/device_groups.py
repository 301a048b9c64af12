"""Which devices a collective of an HLO program joins, and along which mesh axes they differ.

XLA writes groups of devices in three ways, all of which one program may hold: {{0,1},{2,3}}; [2,2]<=[2,2]T(1,0), rows
of a transposed count; and mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, along an axis of XLA's own mesh.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(?P<groups>\{[\d,{} ]*\})\}")
_COUNTED = re.compile(r"replica_groups=\[(?P<shape>[\d,]+)\]<=\[(?P<base>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]+)\]"
    r"(?:, device_ids=\(\[(?P<base>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))? \{(?P<along>[^}]*)\}"
)


def axes_crossed(instruction: str, axes: Mapping[str, int]) -> list[str]:
    """The axes along which the members of a group differ.

    axes: sizes of the mesh's axes, in the order in which the mesh numbers its devices.
    """
    sizes = list(axes.values())
    crossed: set[str] = set()
    for group in device_groups(instruction, math.prod(sizes)):
        places = [_place(device, sizes) for device in group]
        crossed |= {name for name, along in zip(axes, zip(*places, strict=True), strict=True) if len(set(along)) > 1}
    return [name for name in axes if name in crossed]


def device_groups(instruction: str, count: int) -> tuple[tuple[int, ...], ...]:
    """The groups of an instruction's text, of pairs those of a permutation; all `count` devices where it names none."""
    for form in (_LISTED, _COUNTED, _MESH):
        if found := form.search(instruction):
            return _groups(found[0], count)
    return (tuple(range(count)),)


@functools.lru_cache(maxsize=4096)
def _groups(text: str, count: int) -> tuple[tuple[int, ...], ...]:
    if listed := _LISTED.match(text):
        return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d, ]+)\}", listed["groups"]))
    if counted := _COUNTED.match(text):
        _, width = _numbers(counted["shape"])
        devices = _transposed(_numbers(counted["base"]), counted["order"])
        return tuple(tuple(devices[first : first + width]) for first in range(0, len(devices), width))
    mesh = _MESH.match(text)
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh["sizes"])}
    devices = _transposed(_numbers(mesh["base"] or str(count)), mesh["order"])
    along = set(re.findall(r"'([^']+)'", mesh["along"]))
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, device in zip(itertools.product(*map(range, sizes.values())), devices, strict=True):
        fixed = tuple(at for name, at in zip(sizes, place, strict=True) if name not in along)
        groups.setdefault(fixed, []).append(device)
    return tuple(map(tuple, groups.values()))


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
