"""What the matrix products of a compiled step became: read from its HLO."""

from __future__ import annotations

import re
from collections import Counter

from maxlm.numerics import PRODUCTS

_CALL = re.compile(r"= \(?(\w+\[[\d,]*\]).*? (dot|convolution|custom-call)\((.*)")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_NAME = re.compile(r'op_name="([^"]*)"')
_FP8_CALL = "__cublas$lt$matmul$f8"
_CALLS = (_FP8_CALL, "__cublas$lt$matmul", "__cublas$gemm")


def products(text: str) -> dict[str, dict[str, dict[str, int]]]:
    """{'forward': {'__cublas$lt$matmul$f8': {'bf16[32768,8192]': 16}}, 'input_gradient': ..., 'weight_gradient': ...,
    'other': ...}: how often each product was compiled to which call, by the shape of its result. A loop's body counts
    once. 'other' are products that are not of a recipe in 8 bits, such as the head's."""
    found: dict[str, dict[str, Counter]] = {}
    for line in text.splitlines():
        call = _CALL.search(line)
        if not call:
            continue
        shape, kind, rest = call.groups()
        target = _TARGET.search(rest)
        if kind == "custom-call" and (not target or target[1] not in _CALLS):
            continue
        name = _NAME.search(rest)
        product = next((p for p in PRODUCTS if name and f"/fp8_{p}/" in name[1]), "other")
        found.setdefault(product, {}).setdefault(target[1] if target else kind, Counter())[shape] += 1
    return {product: {call: dict(shapes) for call, shapes in calls.items()} for product, calls in found.items()}


def slow_products(found: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """One line for each product of a recipe in 8 bits that is not cuBLASLt's FP8 call, or that was not found at all."""
    lines = [f"{product}: none found" for product in PRODUCTS if product not in found]
    return lines + [f"{product}: {count} of {shape} by {call}" for product in PRODUCTS
                    for call, shapes in found.get(product, {}).items() if call != _FP8_CALL
                    for shape, count in shapes.items()]
