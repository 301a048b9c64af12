"""What a GPU's program multiplies inside of its libraries' calls, which its text names and does not open.

cuBLASLt's products, cuDNN's attention and our Mosaic kernels (kernels/grouped_matmul), read from the shapes
and the backend configs of their custom calls.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from maxlm.flops import mean_visible_keys
from maxlm.planning.hlo import Instruction, Shape

# Products of [T, K] by [K, T] that attention makes: scores and output; scores again, dv, dp, dq and dk.
_FORWARD, _BACKWARD = 2, 5
_CONTRACTED = re.compile(r'"dot_dimension_numbers":\{[^}]*"lhs_contracting_dimensions":\[([^\]]*)\]')
_SCORES = re.compile(r'"intermediate_tensor_shape":\{"dimensions":\[([^\]]*)\]')
_WINDOW = re.compile(r'"sliding_window_length":(\d+)')
_GROUPED = re.compile(r"\((grouped_product|grouped_weights|gated_product|gated_gradients)\)")


class LibraryProduct(NamedTuple):
    """operands: whose types decide the precision. by_rows: of experts, whose buffers an even load may not fill."""

    flops: float
    operands: tuple[Shape, ...]
    by_rows: bool = False


def library_product(target: str, node: Instruction, operands: list[Shape]) -> LibraryProduct | None:
    """The products of a custom call to `target`; None where it makes none that are known here."""
    if target.startswith("__cublas$"):
        return _gemm(node, operands)
    if target.startswith("__cudnn$fmha"):
        return _attention(target, node, operands)
    if target.startswith("mosaic_gpu") and (kernel := _GROUPED.search(node.source)):
        return _grouped(kernel[1], node, operands)
    return None


def _gemm(node: Instruction, operands: list[Shape]) -> LibraryProduct:
    """Behind the two factors come what is added (beta) and an 8-bit product's scales; behind the result, workspace."""
    found = _CONTRACTED.search(node.attributes)
    assert found is not None, f"{node.name} does not say what it contracts"
    inner = math.prod(operands[0].dims[dim] for dim in _numbers(found[1]))
    return LibraryProduct(2.0 * node.shape.elements * inner, tuple(operands[:2]))


def _attention(target: str, node: Instruction, operands: list[Shape]) -> LibraryProduct:
    """Pairs of a query and a key that the mask shows, packed documents as one. cuDNN does blocks, and does not tell of
    what size."""
    found, window = _SCORES.search(node.attributes), _WINDOW.search(node.attributes)
    assert found is not None, f"{node.name} does not say the shape of its scores"
    rows, heads, queries, keys = _numbers(found[1])
    shown = float(keys)
    if "CAUSAL" in node.attributes and queries == keys:
        shown = mean_visible_keys(keys, int(window[1]) if window and int(window[1]) else keys)
    products = _BACKWARD if target.endswith("Backward") else _FORWARD
    return LibraryProduct(2.0 * products * rows * heads * queries * shown * operands[0].dims[-1], tuple(operands[:2]))


def _grouped(kernel: str, node: Instruction, operands: list[Shape]) -> LibraryProduct:
    """Pairs of rows [R, K] and experts' matrices, summed; gate and up of the same rows, or down's gradient to the
    units, with what is made of them; or a gradient of such matrices, summed over the rows. All rows of the buffers, in
    which each expert's begin a block of their own."""
    factors = tuple(shape for shape in operands if len(shape.dims) >= 2)
    if kernel == "grouped_weights":
        return LibraryProduct(2.0 * factors[0].elements * node.shape.dims[-1], factors, by_rows=True)
    rows = factors[::2] if kernel == "grouped_product" else factors[:1]
    inner = sum(shape.dims[-1] for shape in rows) * (2 if kernel == "gated_product" else 1)
    return LibraryProduct(2.0 * node.shape.elements * inner, factors, by_rows=True)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
