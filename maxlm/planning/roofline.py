"""A step's time from its compiled program: the schedule that the compiler wrote, played at the chip's peaks.

Every instruction takes the larger of its products at the chip's peak and its main-memory traffic at the chip's
bandwidth. A synchronous collective holds everything up for as long as its bytes take over the links of its group; an
asynchronous one runs beside what is scheduled between its start and its end, and only what is left over shows. Copies
into VMEM run beside the rest in the same way. Loops count as often as they turn. So the estimate is a bound that a chip
can approach and not pass: it knows nothing of latencies, launch times or how well a kernel does
(docs/PODS.md has what that leaves out).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from maxlm.planning.cost import KINDS, Cost, Costs
from maxlm.planning.hlo import Computation, Instruction, Module
from maxlm.planning.traffic import Collective, Traffic, meeting


@dataclass
class Timeline:
    """What one run of a computation takes, in seconds, and what its loops and calls take with it."""

    seconds: float = 0.0
    compute_seconds: float = 0.0  # products at the peak, as the matrix unit does them
    memory_seconds: float = 0.0  # main-memory traffic at its bandwidth
    flops: float = 0.0
    exposed: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by mesh axis: waited for
    collectives: list[tuple[Collective, int]] = field(default_factory=list)

    def add(self, other: Timeline, times: int = 1) -> None:
        self.seconds += times * other.seconds
        self.compute_seconds += times * other.compute_seconds
        self.memory_seconds += times * other.memory_seconds
        self.flops += times * other.flops
        for axis, waited in other.exposed.items():
            self.exposed[axis] += times * waited
        self.collectives += [(collective, times * count) for collective, count in other.collectives]

    def total(self, axis_seconds: str) -> float:
        return sum(times * getattr(collective, axis_seconds) for collective, times in self.collectives)


@dataclass(frozen=True)
class Peaks:
    """Of one device: products of bf16, and bytes, a second."""

    flops_per_second: float
    bytes_per_second: float


class Roofline:
    def __init__(self, module: Module, costs: Costs, traffic: Traffic, rates: Peaks):
        self.module, self.costs, self.traffic, self.rates = module, costs, traffic, rates
        self._played: dict[str, Timeline] = {}

    def step(self) -> Timeline:
        return self._play(self.module.computations[self.module.entry])

    def _play(self, computation: Computation) -> Timeline:
        if computation.name not in self._played:
            self._played[computation.name] = _Player(self, computation).play()
        return self._played[computation.name]

    def inner(self, node: Instruction) -> list[tuple[Timeline, int]]:
        """The computations that a loop, a call or a conditional runs, and how often. Of a conditional's branches one
        runs: the longest counts."""
        if node.opcode == "while":
            body = self.module.computations[self.module.named(node, "body")]
            return [(self._play(body), self.module.trips(self._holder(node), node))]
        if node.opcode in ("call", "conditional"):
            called = [self._play(self.module.computations[name]) for name in node.called]
            return [(max(called, key=lambda line: (line.seconds, line.flops)), 1)]
        return []

    def _holder(self, node: Instruction) -> Computation:
        return next(c for c in self.module.computations.values() if c.instructions.get(node.name) is node)


class _Player:
    """Plays one computation in the compiler's order. `now` is when the cores are free; `busy` when each network and the
    copies are; `ending` when what was started will be there."""

    def __init__(self, roofline: Roofline, computation: Computation):
        self.roofline, self.computation = roofline, computation
        self.now = 0.0
        self.busy: dict[str, float] = defaultdict(float)
        self.ending: dict[str, tuple[float, str]] = {}
        self.line = Timeline()

    def play(self) -> Timeline:
        for node in self.computation:
            self._instruction(node)
        self.line.seconds = self.now
        return self.line

    def _instruction(self, node: Instruction) -> None:
        inner = self.roofline.inner(node)
        for timeline, times in inner:
            self.now += times * timeline.seconds
            self.line.add(timeline, times)
        if inner:
            return
        role, collective = self._role(node)
        if role == "end":
            self._wait(node, collective)
        elif role == "start":
            self._start(node, collective)
        elif role == "none":
            return
        elif collective is not None:
            self._hold(collective)
        else:
            self._work(node)

    def _role(self, node: Instruction) -> tuple[str, Collective | None]:
        """What `node` is to a collective or a copy: its 'start', its 'end', 'none' of these and no work, or '' for all
        of one, or for plain work."""
        if node.opcode == "send" and (collective := self.roofline.traffic.between_slices(self.computation, node)):
            return "start", collective
        if node.opcode.endswith("-done"):
            return "end", None
        if node.opcode == "async-update":
            return self._update(node)
        if node.opcode == "async-start" and not node.operands:
            return "none", None  # on a SparseCore: it gets its operands, and begins, with its update
        if node.opcode.endswith("-start"):
            return "start", self._collective_in(node)
        if node.opcode == "fusion":
            inner = self.roofline.module.computations[node.called[0]]
            collective = self._collective_in(node)
            if collective is None:
                return "", None
            text = " ".join(i.attributes for i in inner if i.opcode == "custom-call")
            if "AsyncCollectiveStart" in text:
                return "start", collective
            if "AsyncCollectiveDone" in text:
                return "end", collective
            if any("async_collective_fusion_config" in i.attributes for i in inner):
                return "", None  # it works while one runs
            return "", collective
        return "", self._collective_in(node)

    def _update(self, node: Instruction) -> tuple[str, Collective | None]:
        begun = self.computation[node.operands[0]]
        if begun.opcode == "async-start" and not begun.operands:
            return "start", self._collective_in(begun)
        if begun.name in self.ending:
            self.ending[node.name] = self.ending.pop(begun.name)
        return "none", None

    def _collective_in(self, node: Instruction) -> Collective | None:
        """The collective that `node` is, or that the computation it calls holds."""
        if node.opcode.removesuffix("-start") in KINDS:
            return self.roofline.traffic.of(self.computation, node)
        if node.opcode in ("fusion", "async-start"):
            return self._held(self.roofline.module.computations[node.called[0]], node.opcode == "async-start")
        return None

    def _held(self, computation: Computation, asynchronous: bool) -> Collective | None:
        """The collective that a computation holds, or one that it calls."""
        starts = asynchronous or any(
            "AsyncCollectiveStart" in i.attributes for i in computation if i.opcode == "custom-call")
        for member in computation:
            if member.opcode in KINDS:
                return self.roofline.traffic.of(computation, member, asynchronous=starts)
            for name in member.called if asynchronous else ():
                if found := self._held(self.roofline.module.computations[name], asynchronous):
                    return found
        return None

    def _start(self, node: Instruction, collective: Collective | None) -> None:
        if collective is None:  # a copy or a slice into VMEM
            cost = Cost(bytes=self._copied(node))
            seconds = cost.bytes / self.roofline.rates.bytes_per_second
            self.line.memory_seconds += seconds
            networks, axis = ["copies"], ""
        else:
            seconds, axis = collective.seconds, collective.axis
            networks = _networks(collective)
            self.line.collectives.append((collective, 1))
        ending = (self._occupy(networks, seconds), axis)
        self.ending[node.name] = ending
        if collective is not None:
            self.ending[f"channel {collective.channel}"] = ending

    def _copied(self, node: Instruction) -> float:
        """Main-memory bytes of an asynchronous copy or slice: what it reads there and what it writes there."""
        if node.opcode == "copy-start":
            target, source = node.shapes[0], node.shapes[1]
            return target.bytes * ((not target.space) + (not source.space))
        if node.opcode == "async-update":
            node = self.computation[node.operands[0]]
        if node.opcode != "async-start":
            return 0.0
        inner = self.roofline.module.computations[node.called[0]]
        written = sum(s.bytes for s in inner.root.shapes if not s.space)
        if node.source.endswith("/gather"):  # a SparseCore's, in which it cannot be seen that it reads these rows alone
            return 2 * written
        read = sum(self.roofline.costs.bytes_read(inner, i.name) for i in inner
                   if i.opcode == "parameter" and not i.shape.space)
        return read + written

    def _wait(self, node: Instruction, collective: Collective | None) -> None:
        names = [f"channel {collective.channel}"] if collective is not None else list(node.operands[:1])
        if node.opcode == "recv-done":
            names = [f"channel {meeting(self.computation[node.operands[0]])}"]
        for name in names:
            ends, axis = self.ending.pop(name, (0.0, ""))
            if ends > self.now:
                if axis:
                    self.line.exposed[axis] += ends - self.now
                self.now = ends

    def _hold(self, collective: Collective) -> None:
        end = self._occupy(_networks(collective), collective.seconds)
        self.line.exposed[collective.axis] += end - self.now
        self.line.collectives.append((collective, 1))
        self.now = end

    def _occupy(self, networks: list[str], seconds: float) -> float:
        """When what takes `seconds` of all these networks, and waits for them first, is done."""
        end = max(self.now, *(self.busy[network] for network in networks)) + seconds
        self.busy.update(dict.fromkeys(networks, end))
        return end

    def _work(self, node: Instruction) -> None:
        cost, rates = self.roofline.costs.of(self.computation, node), self.roofline.rates
        compute, memory = cost.unit_flops / rates.flops_per_second, cost.bytes / rates.bytes_per_second
        self.line.flops += cost.flops
        self.line.compute_seconds += compute
        self.line.memory_seconds += memory
        self.now += max(compute, memory)


def _networks(collective: Collective) -> list[str]:
    """What it has to itself: the links of its axis, in one direction or both."""
    return [f"{collective.axis} {way}" for way in collective.ways]
