"""Reads the text of an optimized HLO module: computations, instructions, shapes, and how often each computation runs.

Only what the cost of a program needs is read. A loop whose number of turns cannot be told is an error, never a one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_LEAF = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[\d,<= ]*)\](?:\{(?P<layout>[^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|called_computations|branch_computations|"
                     r"(?:true|false)_computation)=(?:\{(?P<several>[^}]*)\}|%?(?P<one>[\w.\-]+))")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INTEGER_TYPES = frozenset({"s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"})


@dataclass(frozen=True)
class Shape:
    """One array: its type, sizes, and the memory that its layout names (0 is HBM; on TPUs 1 is VMEM)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        width = BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else None)
        assert width is not None, f"unknown HLO type {self.dtype}"
        return self.elements * width


@dataclass(frozen=True)
class Instruction:
    """`shapes`: the arrays of its result, in order; `operands`: names; `attributes`: all text behind the operands."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    def attribute(self, name: str) -> str | None:
        """The value of `name=value`, braces included."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found[1] if found else None

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it names: of a while loop first the condition, then the body."""
        names: list[str] = []
        for found in _CALLED.finditer(self.attributes.split("metadata=")[0]):
            names += re.findall(r"[\w.\-]+", found["several"] if found["several"] is not None else found["one"])
        return tuple(names)

    @property
    def source(self) -> str:
        """The JAX operation that it came from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @property
    def root(self) -> Instruction:
        return next(i for i in self if i.root)

    def parameter(self, number: int) -> Instruction:
        return next(i for i in self if i.opcode == "parameter" and i.arguments == str(number))


@dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str

    def trips(self, caller: Computation, loop: Instruction) -> int:
        """Turns of a while loop, from what XLA noted or from its condition. Raises ValueError where neither says."""
        if known := _KNOWN_TRIPS.search(loop.attributes):
            return int(known[1])
        condition, body = (self.computations[self.named(loop, role)] for role in ("condition", "body"))
        compared = self._comparison(condition)
        if compared is None:
            raise ValueError(f"the condition of loop {loop.name} is not one comparison")
        computation, test, outer = compared
        start = _Scalars(self, caller)
        limits = []
        for side in test.operands:
            index = _Scalars(self, computation, outer).carried(side)
            value = _Scalars(self, computation, outer).value(side)
            if value is None and index is not None:
                value = start.element(loop.operands[0], index)
            limits.append((index, value))
        direction = test.attribute("direction")
        if direction == "GT" or direction == "GE":
            limits, direction = limits[::-1], {"GT": "LT", "GE": "LE"}[direction]
        (counter, first), (_, last) = limits
        step = _Scalars(self, body).step(counter) if counter is not None else None
        if first is None or last is None or not step or direction not in ("LT", "LE", "NE"):
            raise ValueError(f"cannot tell how often loop {loop.name} turns: {test.name} {direction} {limits} {step}")
        return max(0, math.ceil((last + (direction == "LE") - first) / step))

    def named(self, loop: Instruction, role: str) -> str:
        name = loop.attribute(role)
        assert name is not None, f"{loop.name} has no {role}"
        return name.lstrip("%")

    def _comparison(self, condition: Computation) -> tuple[Computation, Instruction, _Scalars | None] | None:
        """The compare that a condition returns, the computation that holds it, and whose operands feed that one."""
        root, computation, outer = condition.root, condition, None
        while root.opcode == "fusion":
            outer = _Scalars(self, computation, outer, root.operands)
            computation = self.computations[root.called[0]]
            root = computation.root
        return (computation, root, outer) if root.opcode == "compare" else None

    def runs(self) -> dict[str, int]:
        """How often each computation runs in one execution: the product of the trips of the loops around it. Of a
        conditional every branch counts, as a bound. Callers come before those that they call."""
        counts = {self.entry: 1}
        order = self._callers_first()
        for name in order:
            computation = self.computations[name]
            for instruction in computation:
                times = self.trips(computation, instruction) if instruction.opcode == "while" else 1
                for called in instruction.called:
                    if called in self.computations:
                        counts[called] = counts.get(called, 0) + times * counts[name]
        return {name: counts[name] for name in order}

    def _callers_first(self) -> list[str]:
        done: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            seen.add(name)
            for instruction in self.computations[name]:
                for called in instruction.called:
                    if called not in seen and called in self.computations:
                        visit(called)
            done.append(name)

        visit(self.entry)
        return done[::-1]


@dataclass(frozen=True)
class _Scalars:
    """Integers that a computation works out at compile time: constants, sums and products of them, and what comes in
    through the parameters of fusions (`outer` evaluates those: it holds the caller and the call's operands)."""

    module: Module
    computation: Computation
    outer: _Scalars | None = None
    operands: tuple[str, ...] = ()

    def value(self, name: str, depth: int = 0) -> int | None:
        node = self.computation[name]
        if depth > 50:
            return None
        if node.opcode == "constant":
            return int(node.arguments) if re.fullmatch(r"-?\d+", node.arguments) else None
        if node.opcode == "parameter" and self.outer is not None:
            return self.outer.value(self.outer.operands[int(node.arguments)])
        if node.opcode in ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start"):
            return self.value(node.operands[0], depth + 1)
        if node.opcode in ("add", "subtract", "multiply"):
            left, right = (self.value(operand, depth + 1) for operand in node.operands)
            if left is None or right is None:
                return None
            return {"add": left + right, "subtract": left - right, "multiply": left * right}[node.opcode]
        return None

    def carried(self, name: str) -> int | None:
        """The place in the loop's state that `name` is, if it is one."""
        node = self.computation[name]
        if node.opcode in ("copy", "bitcast"):
            return self.carried(node.operands[0])
        if node.opcode == "parameter" and self.outer is not None:
            return self.outer.carried(self.outer.operands[int(node.arguments)])
        if node.opcode == "get-tuple-element" and self.computation[node.operands[0]].opcode == "parameter":
            return int(node.attribute("index"))
        return None

    def element(self, name: str, index: int) -> int | None:
        """The integer in place `index` of a tuple."""
        node = self.computation[name]
        return self.value(node.operands[index]) if node.opcode == "tuple" else None

    def step(self, index: int) -> int | None:
        """What the loop's body adds to place `index` of its state."""
        root = self.computation.root
        if root.opcode != "tuple":
            return None
        added = self.computation[root.operands[index]]
        scalars = self
        while added.opcode in ("copy", "bitcast", "fusion"):
            if added.opcode == "fusion":
                outer = _Scalars(self.module, scalars.computation, scalars.outer, added.operands)
                scalars = _Scalars(self.module, self.module.computations[added.called[0]], outer)
                added = scalars.computation.root
            else:
                added = scalars.computation[added.operands[0]]
        if added.opcode != "add":
            return None
        steps = [scalars.value(side) for side in added.operands if scalars.carried(side) != index]
        return steps[0] if len(steps) == 1 else None


def parse(text: str) -> Module:
    """The module that `text` prints. Raises ValueError where it has no entry computation."""
    computations: dict[str, Computation] = {}
    current, entry = None, None
    for line in _whole_lines(text):
        if current is None:
            if head := _HEAD.match(line):
                current = computations[head["name"]] = Computation(head["name"])
                entry = head["name"] if head["entry"] else entry
        elif _END.match(line):
            current = None
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(line[found.end() :], found["name"], bool(found["root"]))
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("no ENTRY computation in this HLO text")
    return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, with those that an attribute of several lines (a kernel's metadata) goes on in put back behind it."""
    held = ""
    for line in text.splitlines():
        if held and not (_INSTRUCTION.match(line) or _END.match(line)):
            held += line
            continue
        if held:
            yield held
        held = line if _INSTRUCTION.match(line) else ""
        if not held:
            yield line
    yield held


def _instruction(rest: str, name: str, root: bool) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing - 1]
    return Instruction(
        name=name, opcode=rest[:opening], shapes=tuple(shapes(kind)),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)), arguments=arguments, attributes=rest[closing:],
        root=root,
    )


def shapes(text: str) -> Iterator[Shape]:
    """The arrays of a type, a tuple's in order."""
    for leaf in _LEAF.finditer(text):
        space = _SPACE.search(leaf["layout"] or "")
        dims = tuple(int(size.strip("<= ")) for size in leaf["dims"].split(",") if size)
        yield Shape(leaf["dtype"], dims, int(space[1]) if space else 0)


def _closing(text: str, opening: int) -> int:
    """The place after the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")
