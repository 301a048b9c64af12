"""Attention over rows that `mesh.context` splits, by each way: whether it is right, and how fast it is.

    python3 benchmarks/context_attention.py --json context.json      (on 2, 4 or 8 GPUs; about 2 minutes)

All devices share the rows. Each way is checked, values and gradients, against float32 reference attention of a short
packed row, and then timed, forward and backward, in a chain of layers, on rows of one document and of 8. TFLOP/s a
device count the causal half of whole rows (3.5 times 4*B*H*T*T*K/2). One device with rows of T / C tokens is timed as
well: the same tokens a device, and 1/C of the products.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.config import MeshConfig
from maxlm.kernels.attention import attention
from maxlm.parallel.context import balanced_order, row_order
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import BATCH

LAYERS = 4  # calls in a chain, so that launches overlap as they do in a model
WAYS = ("ring", "all_gather", "all_to_all")


def inputs(B, T, H, G, K, documents):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (np.asarray(jax.random.normal(key, (B, T, heads, K), jnp.bfloat16))
                     for key, heads in zip(keys, (H, G, G, H), strict=True))
    cuts = np.sort(np.random.default_rng(0).choice(np.arange(1, T), documents - 1, replace=False))
    segments = np.broadcast_to(1 + np.searchsorted(cuts, np.arange(T), side="right"), (B, T)).astype(np.int32)
    return q, k, v, dout, segments


def value_and_gradients(way, kernel, layers):
    """Of `layers` attentions in a chain; arrays in the order of their rows go in."""

    def both(q, k, v, dout, segments):
        q, k, v, dout, segments = balanced_order((q, k, v, dout, segments))

        attend = functools.partial(attention, segment_ids_BT=segments, window=None, softcap=0.0, implementation=kernel,
                                   across=way)

        def chain(q, k, v):
            for _ in range(layers):
                q = attend(q, k, v)
            return q

        out, pull = jax.vjp(chain, q, k, v)
        return (out, *pull(dout))

    return jax.jit(both)


def placed(mesh, arrays):
    return [jax.device_put(a, NamedSharding(mesh, P(BATCH, "context", *(None,) * (a.ndim - 2)))) for a in arrays]


def error(mesh, way, kernel, shape):
    """The largest difference from the reference in float32 on one device, of its largest value."""
    arrays = inputs(*shape, documents=5)
    exact = [np.asarray(a, np.float32) if a.ndim > 2 else a for a in arrays]
    want = value_and_gradients("ring", "reference", 1)(*exact)  # no mesh: whole rows
    with jax.set_mesh(mesh):
        got = value_and_gradients(way, kernel, 1)(*placed(mesh, arrays))
    order = np.argsort(row_order(shape[1], mesh.shape["context"]))
    return max(float(np.abs(np.asarray(g, np.float32)[:, order] - np.asarray(w)).max() / np.abs(w).max())
               for g, w in zip(got, want, strict=True))


def milliseconds(mesh, way, kernel, shape, documents):
    """Of a layer, forward and backward: the median of five."""
    with jax.set_mesh(mesh):
        arguments = placed(mesh, inputs(*shape, documents=documents))
        compiled = value_and_gradients(way, kernel, LAYERS).lower(*arguments).compile()
        jax.block_until_ready(compiled(*arguments))
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready([compiled(*arguments) for _ in range(3)])
            times.append((time.perf_counter() - begin) / 3 / LAYERS * 1e3)
    return sorted(times)[2], compiled.memory_analysis().temp_size_in_bytes / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the record here, again after every measurement")
    parser.add_argument("--shape", default="1,32768,32,8,128", help="B,T,H,G,K of the rows that are timed")
    parser.add_argument("--check", default="1,1024,16,8,64", help="of the rows that are checked")
    options = parser.parse_args()
    shape, checked = (tuple(map(int, text.split(","))) for text in (options.shape, options.check))
    devices = jax.devices()
    mesh, alone = make_mesh(MeshConfig(context=len(devices))), make_mesh(MeshConfig(), devices[:1])
    fast = {"gpu": "cudnn", "cpu": "reference"}[devices[0].platform]
    record = {"device": devices[0].device_kind, "devices": len(devices), "jax": jax.__version__, "shape": shape}
    B, T, H, _, K = shape
    flops = 3.5 * 4 * B * H * T * T * K / 2 / len(devices)

    def measure(name, function):
        try:
            record[name] = function()
        except Exception as problem:  # the next way may run
            record[name] = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:200]}"
        print(f"{name}: {record[name]}", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(record, indent=1) + "\n")

    def timed(mesh, way, kernel, shape, flops, documents):
        took, megabytes = milliseconds(mesh, way, kernel, shape, documents)
        return {"ms": round(took, 3), "tflops_a_device": round(flops / took / 1e9, 1), "temporary_mb": round(megabytes)}

    for way in WAYS:
        kernel = fast if way == "all_to_all" else "reference"
        measure(f"{way} ({kernel}), error", functools.partial(error, mesh, way, kernel, checked))
        for documents in (1, 8):
            measure(f"{way} ({kernel}), {documents} documents",
                    functools.partial(timed, mesh, way, kernel, shape, flops, documents))
    part = (B, T // len(devices), *shape[2:])
    measure("one device, its share of the tokens as rows of their own",
            functools.partial(timed, alone, "ring", fast, part, flops / len(devices), 1))


if __name__ == "__main__":
    main()
