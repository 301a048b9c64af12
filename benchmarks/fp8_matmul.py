"""One FP8 product through maxlm's recipes against cuBLASLt through PyTorch, in turns, on one NVIDIA GPU.

    python3 benchmarks/fp8_matmul.py --json benchmarks/results/fp8_matmul.json

Operands are quantised once, outside of the timing. All multiply N x N by N x N into bfloat16 and apply the scales:

- tensor, row: the recipes fp8 and fp8_rowwise, whose products must be compiled to cuBLASLt's FP8 call.
- block: fp8_block as it is, operands taken back to bfloat16 (in the timing) and multiplied there.
- block split: the same sum as N/128 FP8 calls whose results are scaled and added in float32.
- block kernel: the same in one Pallas kernel (Triton), a prototype that lives here until it wins.
- bf16, torch (a scale a tensor), torch row: what to compare with. PyTorch is left out where it is not installed.

`--check` computes all of them at the given size, interpreted where there is no GPU, and compares them with float64.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.experimental.pallas import triton as pltriton  # noqa: E402

from maxlm.config import PrecisionConfig  # noqa: E402
from maxlm.hardware import compiler_options  # noqa: E402
from maxlm.numerics import blocked, numerics_of  # noqa: E402
from maxlm.numerics.blocks import BLOCK, block_along  # noqa: E402
from maxlm.numerics.fp8 import FORWARD, product, quantise  # noqa: E402
from maxlm.training.benchmark import commit  # noqa: E402

FP8_CALL = "__cublas$lt$matmul$f8"
TILE = 128  # rows and columns of the kernel's result


def quantised(name: str, size: int):
    """(product of two operands, operands) of a recipe with scales a tensor or a row."""
    recipe = numerics_of(PrecisionConfig(recipe=name), jax.default_backend()).mlp
    operands = [quantise(jax.random.normal(jax.random.key(i), (size, size)), FORWARD, range(1, 2), recipe)
                for i in (0, 1)]
    return lambda a, b: product(recipe, a, b, 1, jnp.bfloat16, None), operands


def block_operands(size: int):
    """[M, K] in blocks of 1 x 128 and [N, K] in blocks of 128 x 128."""
    x, w = (jax.random.normal(jax.random.key(i), (size, size)) for i in (0, 1))
    return [blocked.quantise(x, *_rows(size)), blocked.quantise(w, *_squares(size))]


def _rows(size: int):
    return (block_along(-1, size, False),)


def _squares(size: int):
    return block_along(-1, size, False), block_along(-2, size, False)


def _dot(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def as_it_is(x, w):
    size = x.values.shape[0]
    left, right = (blocked.dequantised(a, jnp.bfloat16, *cut) for a, cut in ((x, _rows(size)), (w, _squares(size))))
    return _dot(left, right, jnp.bfloat16)


def split(x, w):
    size = x.values.shape[0]
    total = jnp.zeros((size, size), jnp.float32)
    for block in range(size // BLOCK):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        columns = jnp.repeat(w.factors[:, block], BLOCK)
        total += _dot(x.values[:, part], w.values[:, part], jnp.float32) * x.factors[:, block, None] * columns[None]
    return total.astype(jnp.bfloat16)


def kernel(x, w, *, interpret: bool):
    size = x.values.shape[0]

    def tile(x_ref, w_ref, x_factors_ref, w_factors_ref, y_ref):
        def add(block, total):
            part = pl.ds(block * BLOCK, BLOCK)
            factors = x_factors_ref[block, :] * w_factors_ref[block, 0]
            return total + _dot(x_ref[:, part], w_ref[:, part], jnp.float32) * factors[:, None]

        zeros = jnp.zeros((TILE, TILE), jnp.float32)
        y_ref[...] = jax.lax.fori_loop(0, size // BLOCK, add, zeros).astype(jnp.bfloat16)

    blocks = size // BLOCK
    return pl.pallas_call(
        tile, grid=(size // TILE, size // TILE), interpret=interpret,
        in_specs=[pl.BlockSpec((TILE, size), lambda i, j: (i, 0)), pl.BlockSpec((TILE, size), lambda i, j: (j, 0)),
                  pl.BlockSpec((blocks, TILE), lambda i, j: (0, i)), pl.BlockSpec((blocks, 1), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((TILE, TILE), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((size, size), jnp.bfloat16),
        compiler_params=pltriton.CompilerParams(num_warps=8, num_stages=3),
    )(x.values, w.values, x.factors.T, w.factors.T)


def candidates(size: int):
    """Name -> (function of its operands, operands)."""
    blocks = block_operands(size)
    plain = [jax.random.normal(jax.random.key(i), (size, size)).astype(jnp.bfloat16) for i in (0, 1)]
    in_kernel = functools.partial(kernel, interpret=jax.default_backend() != "gpu")
    return {"tensor": quantised("fp8", size), "row": quantised("fp8_rowwise", size), "block": (as_it_is, blocks),
            "block split": (split, blocks), "block kernel": (in_kernel, blocks),
            "bf16": (lambda a, b: _dot(a, b, jnp.bfloat16), plain)}


def compiled(name: str, function, arguments):
    call = jax.jit(function, compiler_options=compiler_options(jax.default_backend())).lower(*arguments).compile()
    if name in ("tensor", "row", "block split"):
        assert FP8_CALL in call.as_text(), f"{name} was not compiled to cuBLASLt's FP8 call"
    return lambda: call(*arguments), jax.block_until_ready


def torchs(size: int):
    try:
        import torch
    except ImportError:
        print("without PyTorch: it is not installed", file=sys.stderr)
        return {}
    a, b = (torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    whole = torch.ones((), device="cuda")
    rows, columns = torch.ones(size, 1, device="cuda"), torch.ones(1, size, device="cuda")
    multiply = lambda left, right: lambda: torch._scaled_mm(  # noqa: E731
        a, b.t(), scale_a=left, scale_b=right, out_dtype=torch.bfloat16)
    wait = lambda _: torch.cuda.synchronize()  # noqa: E731
    return {"torch": (multiply(whole, whole), wait), "torch row": (multiply(rows, columns), wait)}


def teraflops(call, wait, size: int, repeats: int) -> float:
    wait(call())
    start = time.perf_counter()
    for _ in range(repeats):
        last = call()
    wait(last)
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e12


def check(size: int) -> None:
    """Raises AssertionError where a candidate is further from the exact product than 8 bits explain."""
    x, w = (np.asarray(jax.random.normal(jax.random.key(i), (size, size)), np.float64) for i in (0, 1))
    exact = x @ w.T
    for name, (function, arguments) in candidates(size).items():
        error = np.linalg.norm(np.asarray(jax.jit(function)(*arguments), np.float64) - exact) / np.linalg.norm(exact)
        print(f"{name:13} error {error:.4f}")
        assert name == "bf16" or 0.01 < error < 0.05, name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.check:
        return check(arguments.size)
    calls, failed = {}, {}
    for name, candidate in candidates(arguments.size).items():
        try:
            calls[name] = compiled(name, *candidate)
            jax.block_until_ready(calls[name][0]())
        except Exception as error:  # a prototype that does not compile is a result too
            if name != "block kernel":
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    calls |= torchs(arguments.size)
    rates = {name: [] for name in calls}
    for _ in range(arguments.turns):
        for name, (call, wait) in calls.items():
            rates[name].append(teraflops(call, wait, arguments.size, arguments.repeats))
    record = {"benchmark": "fp8_matmul", "chip": jax.devices()[0].device_kind, "commit": commit(),
              "size": arguments.size, "versions": {name: version(name) for name in ("jax", "jaxlib")},
              "teraflops": rates, "failed": failed, "ratio_to_torch": {}}
    for name, values in rates.items():
        line = f"{name:13}{statistics.median(values):7.0f} TFLOP/s"
        if "torch" in rates:
            ratios = [a / b for a, b in zip(values, rates["torch"], strict=True)]
            record["ratio_to_torch"][name] = {"median": statistics.median(ratios), "least": min(ratios),
                                              "most": max(ratios)}
            line += f"  {statistics.median(ratios):.3f} of torch ({min(ratios):.3f}-{max(ratios):.3f})"
        print(line)
    for name, reason in failed.items():
        print(f"{name} failed: {reason}")
    if "torch" in rates:
        record["versions"]["torch"] = version("torch")
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
