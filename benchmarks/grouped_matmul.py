"""The experts' products of OLMoE on this machine's first device: checked against `lax.ragged_dot`, then timed.

    python benchmarks/grouped_matmul.py [--tokens 32768] [--json FILE]

Rows are tokens x 8 choices over 64 experts, unevenly: random routing with one expert empty and one that takes a tenth.
Prints TFLOP/s of the forward product and of the two gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.kernels.grouped_matmul import GROUP_MULTIPLE, grouped_matmul

EXPERTS, WIDTH, HIDDEN, CHOICES = 64, 2048, 1024, 8


def group_sizes(rows: int, multiple: int, skewed: bool) -> np.ndarray:
    """Rows of each expert, multiples of `multiple`, that fill `rows`."""
    share = np.random.default_rng(0).dirichlet(np.full(EXPERTS, 200.0))
    if skewed:
        share[3], share[5] = 0, share.sum() / 9
    sizes = (share / share.sum() * rows).astype(int) // multiple * multiple
    sizes[-1] += rows - sizes.sum()
    return sizes.astype(np.int32)


def seconds(function, *operands) -> float:
    jax.block_until_ready(function(*operands))
    times = []
    for _ in range(7):
        clock = time.perf_counter()
        jax.block_until_ready([function(*operands) for _ in range(4)])
        times.append((time.perf_counter() - clock) / 4)
    return statistics.median(times)


def check(name: str, dtype: jnp.dtype) -> float:
    """The largest error over the result's largest value, of the product and its gradients, on fewer rows of which the
    last belong to no expert and hold NaN."""
    rows, behind = 8192, 512
    sizes = jnp.asarray(group_sizes(rows - behind, GROUP_MULTIPLE[name], skewed=True))
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, g = (jax.random.normal(k, s, dtype) for k, s in zip(
        keys, ((rows, WIDTH), (EXPERTS, WIDTH, 256), (rows, 256)), strict=True))
    held = (jnp.arange(rows) < rows - behind)[:, None]
    x = jnp.where(held, x, jnp.nan)

    def all_three(product, x, w):
        out, pull = jax.vjp(product, x, w)
        dx, dw = pull(g)
        return out, jnp.where(held, dx, 0), dw

    got = jax.jit(lambda x, w: all_three(lambda x, w: grouped_matmul(x, (w,), sizes, name)[0], x, w))(x, w)
    exact = [jnp.where(held, x, 0).astype(jnp.float32), w.astype(jnp.float32)]
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(lambda x, w: all_three(
            lambda x, w: jax.lax.ragged_dot(x, w, sizes).astype(g.dtype), x, w))(*exact)
    return max(float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))) / jnp.max(jnp.abs(b)))
               for a, b in zip(got, wanted, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--implementations", nargs="+", default=["mosaic_gpu"])
    parser.add_argument("--json")
    options = parser.parse_args()
    rows, dtype = options.tokens * CHOICES, jnp.bfloat16
    record = {"benchmark": "grouped_matmul", "device_kind": jax.devices()[0].device_kind, "rows": rows,
              "experts": EXPERTS, "width": WIDTH, "expert_dim": HIDDEN, "jax": jax.__version__, "results": []}
    for name in options.implementations:
        error = check(name, dtype)
        for skewed in (False, True):
            sizes = jnp.asarray(group_sizes(rows, GROUP_MULTIPLE[name], skewed))
            x = jax.random.normal(jax.random.key(0), (rows, WIDTH), dtype)
            w = jax.random.normal(jax.random.key(1), (EXPERTS, WIDTH, HIDDEN), dtype)
            product = jax.jit(lambda x, w, s, name=name: grouped_matmul(x, (w,), s, name)[0])
            both = jax.jit(lambda x, w, s, g, name=name: jax.vjp(
                lambda x, w: grouped_matmul(x, (w,), s, name)[0], x, w)[1](g))
            flops = 2 * rows * WIDTH * HIDDEN
            g = product(x, w, sizes)
            result = {"implementation": name, "skewed": skewed, "largest_relative_error": error,
                      "forward_tflops": flops / seconds(product, x, w, sizes) / 1e12,
                      "gradients_tflops": 2 * flops / seconds(both, x, w, sizes, g) / 1e12}
            record["results"].append(result)
            print(result, flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
