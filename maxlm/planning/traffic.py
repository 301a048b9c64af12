"""What the collectives of a program move: bytes by kind and mesh axis, whether asynchronous, and over which links."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from maxlm.hardware import Chip
from maxlm.parallel.device_groups import axes_crossed, device_groups
from maxlm.planning.cost import KINDS
from maxlm.planning.hlo import Computation, Instruction, Module
from maxlm.planning.topology import BOTH_WAYS, Target, links, permuted

_PASSED = ("bitcast", "copy", "copy-start", "copy-done", "reshape")
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_MEETING = re.compile(r'_xla_host_transfer_rendezvous="([^"]+)"')


@dataclass(frozen=True)
class Layout:
    """Where the mesh's devices are: sizes of its axes, and in its order each device's place in its slice's torus and
    its slice."""

    axes: Mapping[str, int]
    coords: tuple[tuple[int, ...], ...]
    slices: tuple[int, ...]


@dataclass(frozen=True)
class Collective:
    """One collective of a program. `wire_bytes`: what one device sends, were it done in a ring; `ici_seconds` and
    `dcn_seconds`: at the bandwidth of the links that its group has. `channel` pairs what starts it with what ends it.
    `ways`: the directions of the torus that it keeps busy; only permutes may leave one free.
    """

    kind: str
    over: tuple[str, ...]
    wire_bytes: float
    ici_seconds: float
    dcn_seconds: float
    asynchronous: bool
    padded: bool
    channel: str
    source: str
    ways: frozenset[str] = BOTH_WAYS

    @property
    def seconds(self) -> float:
        return self.ici_seconds + self.dcn_seconds

    @property
    def axis(self) -> str:
        return "+".join(self.over)


class Traffic:
    """Reads collectives of one module on one layout."""

    def __init__(self, module: Module, layout: Layout, chip: Chip | None, target: Target, efficiency: float = 1.0):
        self.module, self.layout, self.chip, self.target = module, layout, chip, target
        self.efficiency = efficiency
        self._axes = functools.cache(lambda text: tuple(axes_crossed(text, layout.axes)))

    def of(self, computation: Computation, node: Instruction, *, asynchronous: bool = False) -> Collective | None:
        """The collective that `node` is, or None where it joins no two devices."""
        kind = node.opcode.removesuffix("-start")
        grouping = node.attributes.split("metadata=")[0]
        over = self._axes(grouping)
        if kind not in KINDS or not over:
            return None
        groups = device_groups(grouping, len(self.layout.coords))
        received = _payload(computation, node, kind)
        scattered = kind == "all-reduce" and _is_scatter(computation)
        wire = _wire_bytes("reduce-scatter" if scattered else kind, received, len(groups[0]))
        ici, dcn, ways = self._permute(wire, groups) if kind == "collective-permute" else (
            *self._seconds(wire, groups[0]), BOTH_WAYS)
        return Collective("reduce-scatter" if scattered else kind, over, wire, ici, dcn,
                          asynchronous or node.opcode.endswith("-start"),
                          kind == "all-reduce" and not scattered and _pads(self.module, computation, node.operands),
                          node.attribute("channel_id") or node.name, node.source, ways)

    def between_slices(self, computation: Computation, node: Instruction) -> Collective | None:
        """The collective over the network that a `send` begins: libtpu leaves it to the hosts."""
        said = _BETWEEN_SLICES.search(node.attributes)
        if said is None:
            return None
        kind, ways = said[1].lower().replace("_", "-"), len(set(self.layout.slices))
        wire = _wire_bytes(kind, computation[node.operands[0]].shape.bytes, ways)
        chip = self.chip
        network = chip.dcn_bytes_per_second if chip else None
        seconds = wire * chip.devices_per_chip / network if network else 0.0
        return Collective(kind, ("data",), wire, 0.0, seconds, True, False, meeting(node), node.source)

    def _seconds(self, wire: float, group: tuple[int, ...]) -> tuple[float, float]:
        """(over the fast fabric, between slices) of `wire` bytes that each device of the group sends."""
        chip = self.chip
        if chip is None:
            return 0.0, 0.0
        slices = {self.layout.slices[device] for device in group}
        inside = [device for device in group if self.layout.slices[device] == self.layout.slices[group[0]]]
        share = wire / len(inside) if len(slices) > 1 else 0.0  # of what crosses, each device of a slice sends a part
        dcn = share * chip.devices_per_chip / chip.dcn_bytes_per_second if share and chip.dcn_bytes_per_second else 0.0
        if len(inside) == 1:
            return 0.0, dcn
        used = links(chip, self.target, [self.layout.coords[device] for device in inside])
        bandwidth = chip.ici_bytes_per_second / chip.ici_links * min(used, chip.ici_links) / chip.devices_per_chip
        return wire / (bandwidth * self.efficiency), dcn

    def _permute(self, wire: float, pairs: tuple[tuple[int, ...], ...]) -> tuple[float, float, frozenset[str]]:
        """`_seconds` of a permutation, by the busiest link, and the directions that it uses."""
        chip, layout = self.chip, self.layout
        crossing = [pair for pair in pairs if len({layout.slices[device] for device in pair}) > 1]
        if chip is None or crossing or not self.target.shape:
            return *self._seconds(wire, crossing[0] if crossing else pairs[0]), BOTH_WAYS
        messages, ways = permuted(self.target, [tuple(layout.coords[device] for device in pair) for pair in pairs])
        if not messages:  # between the devices of a chip
            return *self._seconds(wire, pairs[0]), BOTH_WAYS
        link = chip.ici_bytes_per_second / chip.ici_links  # which all devices of a chip send over
        return wire * messages / (link * self.efficiency), 0.0, ways


def meeting(node: Instruction) -> str:
    """What pairs the `send` and the `recv` of one exchange between slices; '' where there is none."""
    found = _MEETING.search(node.attributes)
    return found[1] if found else ""


def _payload(computation: Computation, node: Instruction, kind: str) -> float:
    """Bytes of the whole that is gathered, reduced, exchanged or sent, on one device."""
    into = [shape for name in node.operands for shape in computation[name].shapes if shape.elements > 1]
    if kind in ("all-gather", "collective-broadcast"):
        result = node.shapes
        if node.opcode.endswith("-start"):  # (operands, results)
            result = node.shapes[len(node.shapes) // 2 :]
        return sum(shape.bytes for shape in result)
    if kind == "ragged-all-to-all":  # of what is sent and where it arrives, one is room for more than an even load
        return min(computation[node.operands[0]].shape.bytes, computation[node.operands[1]].shape.bytes)
    return sum(shape.bytes for shape in into)


def _wire_bytes(kind: str, payload: float, members: int) -> float:
    """Bytes that one of `members` devices sends, in a ring."""
    if kind in ("collective-permute", "collective-broadcast"):
        return payload
    return payload * (members - 1) / members * (2 if kind == "all-reduce" else 1)


def _is_scatter(computation: Computation) -> bool:
    """TPUs write a reduce-scatter as a fusion of an all-reduce and a slice of it."""
    return computation.name.startswith("all-reduce-scatter")


def _pads(module: Module, computation: Computation, operands: tuple[str, ...]) -> bool:
    """Whether what is reduced is a buffer that is zero but for the device's own part, as where a gather was made of
    an all-reduce. (A little padding, up to a size that divides, is another thing.)"""
    for name in operands:
        inside, node = computation, computation[name]
        while True:
            if node.opcode == "fusion" and len(node.shapes) == 1:
                inside = module.computations[node.called[0]]
                node = inside.root
            elif node.opcode in _PASSED and node.operands:
                node = inside[node.operands[0]]
            else:
                break
        if node.opcode in ("pad", "dynamic-update-slice"):
            part = inside[node.operands[0 if node.opcode == "pad" else 1]].shape
            if 2 * part.elements <= node.shape.elements:
                return True
    return False


def by_axis(found: Iterable[tuple[Collective, int]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{axis: {kind: {count, bytes, asynchronous_bytes, seconds}}} of one step on one device, loops counted in."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for collective, times in found:
        row = table.setdefault(collective.axis, {}).setdefault(
            collective.kind, {"count": 0, "bytes": 0.0, "asynchronous_bytes": 0.0, "seconds": 0.0})
        row["count"] += times
        row["bytes"] += times * collective.wire_bytes
        row["asynchronous_bytes"] += times * collective.wire_bytes * collective.asynchronous
        row["seconds"] += times * collective.seconds
    return table
