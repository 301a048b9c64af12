"""What the matrix products of a compiled step became: read from its HLO."""

from __future__ import annotations

import re
from collections import Counter

from maxlm.numerics import PRODUCTS

FP8_CALL = "__cublas$lt$matmul$f8"
_CALLS = (FP8_CALL, "__cublas$lt$matmul", "__cublas$gemm")
_DEFINED = re.compile(r"(%[\w.-]+) = \(?(\w+)\[")
_PRODUCT = re.compile(r"= \(?(\w+\[[\d,]*\]).*? (dot|convolution|custom-call)\((.*)")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_NAME = re.compile(r'op_name="([^"]*)"')


def products(text: str) -> dict[str, dict[str, dict[str, int]]]:
    """{'forward': {'__cublas$lt$matmul$f8': {'bf16[32768,8192]': 16}}, 'input_gradient': ..., 'weight_gradient': ...,
    'other': ...}: how often each product was compiled to which call, by the shape of its result. A loop's body counts
    once. What is not a library's call is named by its operands, 'convolution f8e4m3fn f8e5m2'. 'other' are products
    that are not of a recipe in 8 bits, such as the head's."""
    types = dict(_DEFINED.findall(text))
    found: dict[str, dict[str, Counter]] = {}
    for line in text.splitlines():
        match = _PRODUCT.search(line)
        if not match:
            continue
        shape, call, rest = match.groups()
        if call == "custom-call":
            target = _TARGET.search(rest)
            if not target or target[1] not in _CALLS:
                continue
            call = target[1]
        else:
            operands = re.findall(r"%[\w.-]+", rest.split(")")[0])
            call = " ".join([call, *(types.get(operand, "?") for operand in operands)])
        name = _NAME.search(rest)
        product = next((p for p in PRODUCTS if name and re.search(rf"\bfp8_{p}\b", name[1])), "other")
        found.setdefault(product, {}).setdefault(call, Counter())[shape] += 1
    return {product: {call: dict(shapes) for call, shapes in calls.items()} for product, calls in found.items()}


def slow_products(found: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """One line for each product of a recipe in 8 bits that is not cuBLASLt's FP8 call, or that was not found at all."""
    lines = [f"{product}: none found" for product in PRODUCTS if product not in found]
    return lines + [f"{product}: {count} of {shape} by {call}" for product in PRODUCTS
                    for call, shapes in found.get(product, {}).items() if call != FP8_CALL
                    for shape, count in shapes.items()]
