"""One FP8 product through maxlm against cuBLASLt through PyTorch, in turns, on one NVIDIA GPU.

    python benchmarks/fp8_matmul.py --json benchmarks/results/fp8_matmul.json

Operands are quantised once, outside of the timing, with a scale a tensor. Both multiply N x N by N x N into bfloat16
and apply the scales. PyTorch is the peer and needs to be installed; times are of `--repeats` calls between two waits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from maxlm.config import PrecisionConfig  # noqa: E402
from maxlm.hardware import compiler_options  # noqa: E402
from maxlm.numerics import numerics_of  # noqa: E402
from maxlm.numerics.fp8 import FORWARD, product, quantise  # noqa: E402


def ours(size: int):
    recipe = numerics_of(PrecisionConfig(recipe="fp8"), "gpu").mlp
    a, b = (quantise(jax.random.normal(jax.random.key(i), (size, size)), FORWARD, range(1, 2), recipe) for i in (0, 1))
    multiply = jax.jit(lambda a, b: product(recipe, a, b, 1, jnp.bfloat16, None),
                       compiler_options=compiler_options("gpu"))
    compiled = multiply.lower(a, b).compile()
    assert "matmul$f8" in compiled.as_text(), "the product was not compiled to cuBLASLt's FP8 call"
    return lambda: compiled(a, b), jax.block_until_ready


def torchs(size: int):
    import torch

    a, b = (torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    return (lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16),
            lambda _: torch.cuda.synchronize())


def teraflops(call, wait, size: int, repeats: int) -> float:
    wait(call())
    start = time.perf_counter()
    for _ in range(repeats):
        last = call()
    wait(last)
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pair = {"maxlm": ours(arguments.size), "torch": torchs(arguments.size)}
    rates = {name: [] for name in pair}
    for _ in range(arguments.turns):
        for name, (call, wait) in pair.items():
            rates[name].append(teraflops(call, wait, arguments.size, arguments.repeats))
    ratios = [a / b for a, b in zip(rates["maxlm"], rates["torch"], strict=True)]
    record = {
        "chip": jax.devices()[0].device_kind, "commit": os.environ.get("MAXLM_COMMIT"), "size": arguments.size,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "torch")}, "teraflops": rates,
        "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
    }
    print(f"maxlm {statistics.median(rates['maxlm']):.0f} TFLOP/s, torch {statistics.median(rates['torch']):.0f}, "
          f"ratio {record['ratio']['median']:.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
