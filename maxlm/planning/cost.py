"""FLOPs and main-memory traffic of HLO instructions: what a fusion multiplies, and what it reads and writes.

Products count as the matrix unit does them: on TPUs dims of fewer than its width (128, on v6e and TPU7x 256) cost as
much as the width. Buffers that the compiler has put into VMEM (memory space 1) are no traffic; the copies that bring
them there are. Of an operand that a fusion only slices, the slice counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from maxlm.planning.hlo import Computation, Instruction, Module, Shape
from maxlm.planning.libraries import library_product

FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
                  "replica-id", "iota", "async-update", "optimization-barrier", "domain", "add-dependency",
                  "send", "recv"})
NO_WORK = frozenset({"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollectiveStart",
                     "AsyncCollectiveDone", "Sharding"})
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")
_RAGGED = re.compile(r'"is_ragged_dot":true,"num_groups_in_ragged_dot":"(\d+)"')
_STATED = re.compile(r'"cost_estimate":\{[^}]*"flops":"(\d+)"')  # what a Pallas kernel says of itself
_PASSING = ("bitcast", "copy")
_SLICING = ("dynamic-slice", "slice", "gather")
# Products that splash attention's kernels make of each visible pair of blocks, of T x T x head_dim each: forward scores
# and output; in its gradients scores again, dp, dq; scores, dp, dv and dk. One kernel makes all five where it can.
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}
_FUSED_BACKWARD = 5


@dataclass(frozen=True)
class Cost:
    flops: float = 0.0
    unit_flops: float = 0.0  # what the matrix unit does meanwhile in bf16: dims filled up, 8-bit products faster
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.unit_flops + other.unit_flops, self.bytes + other.bytes)


class Costs:
    """Costs of one module's instructions. `lanes`: the matrix unit's width (1: any size is as good). `rows_used`: which
    part of the rows that experts have room for holds tokens, at an even load. `fp8`: a product's speed in 8 bits over
    that in bf16."""

    def __init__(self, module: Module, *, lanes: int = 1, rows_used: float = 1.0, fp8: float = 1.0):
        self.module, self.lanes, self.rows_used, self.fp8 = module, lanes, rows_used, fp8
        self._inner: dict[str, Cost] = {}

    def of(self, computation: Computation, node: Instruction) -> Cost:
        """Of an instruction outside fusions. Loops, calls and collectives are not work of their own: nothing."""
        if node.opcode in FREE or (node.opcode == "custom-call" and _target(node) in NO_WORK):
            return Cost()
        if node.opcode == "fusion":
            inner = self.module.computations[node.called[0]]
            work = self._fused(node)
            return work + Cost(bytes=self._fusion_bytes(computation, node, inner))
        work = self._product(computation, node)
        return work + Cost(bytes=self._plain_bytes(computation, node))

    def _fused(self, node: Instruction) -> Cost:
        """All that a fusion multiplies. One form of `ragged_dot` is a product with every group's matrix, of which the
        kernel skips all rows but each group's own."""
        work, groups = self._products(self.module.computations[node.called[0]]), _RAGGED.search(node.attributes)
        if groups is None:
            return work
        used = self.rows_used / int(groups[1])
        return Cost(used * work.flops, used * work.unit_flops, work.bytes)

    def _products(self, computation: Computation) -> Cost:
        """All that a fused computation multiplies, fusions inside it included."""
        if computation.name not in self._inner:
            total = Cost()
            for node in computation:
                total += self._fused(node) if node.opcode == "fusion" else self._product(computation, node)
            self._inner[computation.name] = total
        return self._inner[computation.name]

    def _product(self, computation: Computation, node: Instruction) -> Cost:
        if node.opcode == "dot":
            return self._dot(computation, node)
        if node.opcode == "convolution":
            return self._convolution(computation, node)
        if node.opcode == "custom-call" and _target(node) == "tpu_custom_call":
            return self._kernel(computation, node)
        return self._library(computation, node) if node.opcode == "custom-call" else Cost()

    def _library(self, computation: Computation, node: Instruction) -> Cost:
        into = [shape for name in node.operands for shape in computation[name].shapes[:1]]
        found = library_product(_target(node), node, into)
        if found is None:
            return Cost()
        return self._matrix(found.flops * (self.rows_used if found.by_rows else 1.0), found.operands)

    def _matrix(self, flops: float, operands: Sequence[Shape], *dims: int) -> Cost:
        """`dims`: sizes that lie along the matrix unit's sides."""
        waste = math.prod(math.ceil(dim / self.lanes) * self.lanes / dim for dim in dims if dim)
        eight = all(shape.dtype.startswith("f8") for shape in operands)
        return Cost(flops, flops * waste / (self.fp8 if eight else 1.0))

    def _dot(self, computation: Computation, node: Instruction) -> Cost:
        left, right = (computation[name].shape for name in node.operands[:2])
        contracted = [int(d) for d in re.findall(r"\d+", node.attribute("lhs_contracting_dims") or "")]
        inner = math.prod(left.dims[dim] for dim in contracted)
        return self._matrix(2.0 * node.shape.elements * inner, (left, right), inner)

    def _convolution(self, computation: Computation, node: Instruction) -> Cost:
        """TPUs write every product as a convolution; with padding, most taps of a window may lie outside."""
        left, right = (computation[name].shape for name in node.operands[:2])
        labels = re.match(r"(\w+)_(\w+)->(\w+)", node.attribute("dim_labels"))
        lhs, rhs, out = labels.groups()
        window = _window(node, left, right, lhs, rhs)
        pairs = 1
        for axis in sorted(set(out) - {"b", "f"}):
            pairs *= _taps(left.dims[lhs.index(axis)], node.shape.dims[out.index(axis)], **window[int(axis)])
        features, inner = node.shape.dims[out.index("f")], right.dims[rhs.index("i")]
        batch = node.shape.dims[out.index("b")]
        return self._matrix(2.0 * batch * features * inner * pairs, (left, right), inner)

    def _kernel(self, computation: Computation, node: Instruction) -> Cost:
        into = [computation[name].shape for name in node.operands]
        if node.name.startswith("splash_mha"):
            return self._splash(node, into)
        if node.name.startswith("ragged-dot"):
            floats = [shape for shape in into if shape.dtype in ("bf16", "f32") and len(shape.dims) >= 2]
            if not floats:
                return Cost()
            rows, inner = floats[0].dims[0], floats[0].dims[-1]
            columns = node.shape.dims[-1]
            if len(node.shape.dims) == 3:  # a gradient of the experts' weights: rows are summed over
                inner = node.shape.dims[1]
            return self._matrix(2.0 * rows * inner * columns * self.rows_used, floats, inner, columns)
        # Grouped products of ours state theirs, for all rows that there is room for; in a gradient of the experts'
        # weights rows are summed over.
        if (stated := _STATED.search(node.attributes)) is None:
            return Cost()
        operands = [shape for shape in into if len(shape.dims) >= 2]
        inner = operands[0].dims[-1] if len(node.shape.dims) == 2 else node.shape.dims[-2]
        return self._matrix(float(stated[1]) * self.rows_used, operands, inner, node.shape.dims[-1])

    def _splash(self, node: Instruction, into: list[Shape]) -> Cost:
        """Blocks that a causal mask hides are not computed, those on its edge are, whole."""
        grid, (query, key) = into[0], [s for s in into if s.dtype in ("bf16", "f32") and len(s.dims) >= 3][:2]
        rows, columns = grid.dims[-2:]
        visible = (rows + 1) / (2 * rows) if rows == columns and rows > 1 else 1.0
        *rows_and_heads, length, head = query.dims
        backward = "dkv" in node.name or "dq" in node.name
        fused = "dkv" in node.name and not any("splash_mha_dq" in name for name in self._splash_names())
        kind = "dq" if "dq" in node.name else "dkv" if backward else "fwd"
        products = _FUSED_BACKWARD if fused else _SPLASH[kind]
        shown = length * key.dims[-2] * visible
        return self._matrix(2.0 * products * math.prod(rows_and_heads) * shown * head, (query, key), head)

    def _splash_names(self) -> set[str]:
        return {name for c in self.module.computations.values() for name in c.instructions if name.startswith("splash")}

    def _plain_bytes(self, computation: Computation, node: Instruction) -> float:
        written = sum(s.bytes for s in node.shapes if not s.space)
        if node.opcode in ("dynamic-slice", "slice", "gather", "broadcast"):
            source = computation[node.operands[0]].shape if node.operands else None
            read = sum(s.bytes for s in node.shapes) if source is not None and not source.space else 0.0
            return written + (read if node.opcode != "broadcast" else 0.0)
        if node.opcode == "dynamic-update-slice":
            update = computation[node.operands[1]].shape
            return update.bytes * ((not update.space) + (not node.shape.space))
        return written + sum(s.bytes for name in node.operands for s in computation[name].shapes if not s.space)

    def _fusion_bytes(self, computation: Computation, node: Instruction, inner: Computation) -> float:
        total = 0.0
        for parameter in inner:
            if parameter.opcode != "parameter":
                continue
            operand = computation[node.operands[int(parameter.arguments)]]
            if not any(shape.space for shape in operand.shapes[:1]):
                total += self.bytes_read(inner, parameter.name)
        return total + self._written(inner, inner.root, node.shapes)

    def bytes_read(self, computation: Computation, name: str) -> float:
        """Bytes of `name` that a fused computation reads: whole, or the slices where it only slices."""
        total, whole = 0.0, computation[name].shape.bytes
        for user in computation:
            if name not in user.operands:
                continue
            if user.opcode in _SLICING and user.operands[0] == name:
                total += user.shape.bytes
            elif (user.opcode == "dynamic-update-slice" and user.operands[0] == name) or user.opcode in KINDS:
                continue  # written in place; or a collective's, which runs beside it
            elif user.opcode in _PASSING and user is not computation.root:
                total += self.bytes_read(computation, user.name)
            elif user.opcode == "fusion":
                inner = self.module.computations[user.called[0]]
                for place, operand in enumerate(user.operands):
                    if operand == name:
                        within = inner.parameter(place).name
                        total += self.bytes_read(computation, user.name) if self._passes(inner, within) and (
                            user is not computation.root) else self.bytes_read(inner, within)
            elif user.opcode not in ("tuple", "get-tuple-element"):
                return whole
        return min(total, whole)

    def _passes(self, computation: Computation, name: str) -> bool:
        """Whether a fused computation hands on its parameter `name` and does nothing else: a change of layout, which
        whoever slices its result makes of the slice alone."""
        node = computation.root
        while node.opcode in _PASSING:
            node = computation[node.operands[0]]
        return node.name == name

    def _written(self, computation: Computation, root: Instruction, shapes: tuple[Shape, ...]) -> float:
        if root.opcode == "tuple":
            outputs = [computation[name] for name in root.operands]
            if len(outputs) == len(shapes):
                return sum(self._written(computation, output, (shape,))
                           for output, shape in zip(outputs, shapes, strict=True))
        if root.opcode == "parameter" or root.opcode in KINDS:
            return 0.0
        while root.opcode == "bitcast":
            root = computation[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return computation[root.operands[1]].shape.bytes if not shapes[0].space else 0.0
        if root.opcode == "fusion" and len(shapes) == 1:
            inner = self.module.computations[root.called[0]]
            return self._written(inner, inner.root, shapes)
        return sum(shape.bytes for shape in shapes if not shape.space)


def _target(node: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', node.attributes)
    return found[1] if found else ""


def _window(node: Instruction, left: Shape, right: Shape, lhs: str, rhs: str) -> dict[int, dict[str, int]]:
    """{spatial dim: size, stride, low (padding), base and kernel dilation} of a convolution."""
    text = re.search(r"window=\{([^}]*)\}", node.attributes)
    fields = dict(part.split("=") for part in text[1].split()) if text else {}
    spatial = len(left.dims) - 2
    split = lambda name, default: fields[name].split("x") if name in fields else [default] * spatial  # noqa: E731
    pads = [part.split("_")[0] for part in fields["pad"].split("x")] if "pad" in fields else ["0"] * spatial
    columns = zip(split("size", "1"), split("stride", "1"), pads, split("lhs_dilate", "1"), split("rhs_dilate", "1"),
                  strict=True)
    return {dim: dict(zip(("size", "stride", "low", "base", "kernel"), map(int, column), strict=True))
            for dim, column in enumerate(columns)}


def _taps(into: int, out: int, *, size: int, stride: int, low: int, base: int, kernel: int) -> int:
    """Pairs of an output place and a window place that meet an input that is there."""
    reach = (into - 1) * base + 1
    if size == 1 and not low:
        return sum(1 for place in range(out) if place * stride < reach and place * stride % base == 0)
    return sum(
        1 for place in range(out) for tap in range(size)
        if 0 <= (at := place * stride - low + tap * kernel) < reach and at % base == 0
    )
