"""Attention on one GPU: which ways of computing packed causal attention are right, and how fast they are.

    python3 benchmarks/attention.py --json attention.json      (from the repository root; under 2 minutes on an H200)

Every candidate is first checked, values and gradients, against float32 reference attention on the CPU, on rows of
one document and on packed rows, plain and with a window. Then it is timed in a chain of layers, forward and
forward+backward. TFLOP/s count the causal half of whole rows (4*B*H*T*T*K/2 forward, 3.5 times that with the
backward pass), so a packed candidate that skips work between documents may exceed the hardware's peak. A candidate
whose package is missing, or that fails, reports why.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import types
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.kernels.attention.cudnn_call import Call
from maxlm.kernels.attention.gpu import Documents, cudnn_attention
from maxlm.kernels.attention.reference import reference_attention

SHAPES = {  # name: B, T, H, G, K
    "1B: 4x4096, 32/8 heads of 64": (4, 4096, 32, 8, 64),
    "MoE: 4x4096, 16/16 heads of 128": (4, 4096, 16, 16, 128),
    "3B: 2x4096, 24/8 heads of 128": (2, 4096, 24, 8, 128),
}
LAYERS = 4  # calls in a chain, so that launches overlap as they do in a model
TOLERANCE = 0.02  # of the largest value: bfloat16 products


# --- candidates: f(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, window) -> out_BTHK ---


def jaxnn_causal(q, k, v, segments, window):
    sizes = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=sizes, implementation="cudnn")


def jaxnn_mask(q, k, v, segments, window):
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    sizes = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, local_window_size=sizes, implementation="cudnn"
    )


def maxlm_cudnn(q, k, v, segments, window, per_row=16):
    return cudnn_attention(q, k, v, segments, window=window, scale=q.shape[-1] ** -0.5, segments=per_row)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def ragged_only(q, k, v, segments, window, per_row):
    return _ragged_forward(q, k, v, segments, window, per_row)[0]


def _ragged_forward(q, k, v, segments, window, per_row):
    documents = Documents(segments, per_row)
    call = Call(q.shape[-1] ** -0.5, window, segments=per_row)
    out, stats = call.forward(q, k, v, *documents.ragged(q, k))
    return out, (q, k, v, segments, out, documents.by_token(stats))


def _ragged_backward(window, per_row, kept, dout):
    q, k, v, segments, out, stats = kept
    documents = Documents(segments, per_row)
    call = Call(q.shape[-1] ** -0.5, window, segments=per_row)
    grads = call.backward(q, k, v, out, documents.by_document(stats), dout, *documents.ragged(q, k))
    return (*grads, None)


ragged_only.defvjp(_ragged_forward, _ragged_backward)


def ragged_repeated(q, k, v, segments, window, per_row):
    """Key heads repeated first: cuDNN's ragged backward may hold full-head key gradients otherwise."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return ragged_only(q, k, v, segments, window, per_row)


def import_tokamax():
    """tokamax without xprof (30 MB), which only its own benchmarking uses."""
    for name in ("xprof", "xprof.cli", "xprof.cli.tools", "xprof.cli.tools.get_kernel_stats_tool"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["xprof.cli.tools"].get_kernel_stats_tool = sys.modules["xprof.cli.tools.get_kernel_stats_tool"]
    import tokamax

    return tokamax


def tokamax_causal(q, k, v, segments, window):
    sizes = None if window is None else (window - 1, 0)
    return import_tokamax().dot_product_attention(
        q, k, v, is_causal=True, local_window_size=sizes, implementation="mosaic"
    )


def tokamax_packed(q, k, v, segments, window):
    """The first key of each query's document as `k_start`, which the Mosaic kernel prunes by."""
    import_tokamax()  # whose public function takes no k_start, and whose public module of kernels needs jax-triton
    from tokamax._src.ops.attention.base import Mask
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    T = q.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)[None]
    begins = jnp.ones(segments.shape, bool).at[:, 1:].set(segments[:, 1:] != segments[:, :-1])
    start = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    if window is not None:
        start = jnp.maximum(start, index - (window - 1))
    return PallasMosaicGpuFlashAttention()(q, k, v, mask=Mask(k_start=start[:, None], is_causal=True))


def pallas_triton(q, k, v, segments, window):
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    if window is not None:
        raise NotImplementedError("no window")
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    sizes = BlockSizes(block_q=128, block_k=64, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64)
    return mha(q, k, v, segments, sm_scale=q.shape[-1] ** -0.5, causal=True, block_sizes=sizes)


# name: (function, exact on packed rows, timed at every shape)
CANDIDATES = {
    "jax.nn cudnn, causal": (jaxnn_causal, False, True),
    "jax.nn cudnn, mask": (jaxnn_mask, True, False),
    "maxlm cudnn": (maxlm_cudnn, True, True),
    "ragged 8": (partial(ragged_only, per_row=8), True, False),
    "ragged 16": (partial(ragged_only, per_row=16), True, True),
    "ragged 64": (partial(ragged_only, per_row=64), True, False),
    "ragged 256": (partial(ragged_only, per_row=256), True, False),
    "ragged 16, heads repeated": (partial(ragged_repeated, per_row=16), True, False),
    "tokamax mosaic, causal": (tokamax_causal, False, True),
    "tokamax mosaic, packed": (tokamax_packed, True, True),
    "pallas triton": (pallas_triton, True, False),
}


def bound(name):
    """The candidate with positional arguments alone: custom_vjp resolves nothing by keyword."""
    function = CANDIDATES[name][0]
    if isinstance(function, partial):
        per_row = function.keywords["per_row"]
        return lambda q, k, v, segments, window: function.func(q, k, v, segments, window, per_row)
    return function


def capacity(name):
    """Documents a row that the candidate takes; `maxlm cudnn` falls back by itself."""
    function = CANDIDATES[name][0]
    return function.keywords["per_row"] if isinstance(function, partial) else float("inf")


# --- inputs ---


def rows(B, T, documents, seed=0):
    """segment_ids [B,T]: `documents` of random lengths a row, and padding behind all but the first row."""
    rng = np.random.default_rng(seed)
    out = np.zeros((B, T), np.int32)
    for b in range(B):
        cuts = np.sort(rng.choice(np.arange(1, T), documents - 1, replace=False)) if documents > 1 else []
        out[b] = 1 + np.searchsorted(np.asarray(cuts), np.arange(T), side="right")
        if b:
            out[b, T - 17 * b :] = 0
    return jnp.asarray(out)


def inputs(B, T, H, G, K, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K))
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))


# --- correctness ---


def checked_inputs(documents):
    q, k, v, dout = inputs(2, 1024, 8, 2, 64)
    segments = rows(2, 1024, documents)
    return q, k, v, segments, dout * (segments > 0)[:, :, None, None]  # nothing is asked of padding


@cache
def expected(documents, window):
    cpu = jax.devices("cpu")[0]
    q, k, v, segments, dout = (jax.device_put(x, cpu) for x in checked_inputs(documents))
    attend = partial(reference_attention, window=window, softcap=0.0, scale=q.shape[-1] ** -0.5)
    return _value_and_grads(attend, *(x.astype(jnp.float32) for x in (q, k, v)), segments, dout.astype(jnp.float32))


def errors(name, documents, window):
    """Largest differences from the reference over real tokens, out and the three gradients, of its largest value."""
    q, k, v, segments, dout = checked_inputs(documents)
    got = _value_and_grads(lambda q, k, v, s: bound(name)(q, k, v, s, window), q, k, v, segments, dout)
    want = expected(documents, window)
    real = np.asarray(segments > 0)[:, :, None, None]
    return [
        float(np.abs(np.where(real, np.asarray(g, np.float32) - np.asarray(w), 0)).max() / np.abs(w).max())
        for g, w in zip(got, want, strict=True)
    ]


def _value_and_grads(function, q, k, v, segments, dout):
    def both(q, k, v, segments, dout):
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, segments), q, k, v)
        return (out, *pull(dout.astype(out.dtype)))

    return jax.jit(both)(q, k, v, segments, dout)


def check(name):
    exact = CANDIDATES[name][1]
    record = {}
    for documents, window in ((1, None), (7, None), (7, 200), (40, None)):
        label = f"{documents} documents" + (f", window {window}" if window else "")
        if documents >= capacity(name):
            record[label] = "more documents than it is compiled for"
            continue
        try:
            worst = max(errors(name, documents, window))
        except Exception as problem:
            record[label] = reason(problem)
            continue
        should_match = exact or documents == 1
        record[label] = {"error": worst, "ok": (worst < TOLERANCE) == should_match, "matches": worst < TOLERANCE}
    return record


def reason(problem):
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:200]}"


# --- speed ---


def speed(name, shape, document_counts):
    """{documents a row: times}, by one compiled chain forward and one forward and backward."""
    B, T, H, G, K = shape
    q, k, v, dout = inputs(*shape)
    attend = bound(name)

    def chain(q, k, v, segments):
        for _ in range(LAYERS):
            q = attend(q, k, v, segments, None)
        return q

    def both(q, k, v, segments, dout):
        out, pull = jax.vjp(lambda q, k, v: chain(q, k, v, segments), q, k, v)
        return (out, *pull(dout))

    segments = {n: rows(B, T, n) for n in document_counts}
    some = segments[document_counts[0]]
    forward, total = jax.jit(chain).lower(q, k, v, some).compile(), jax.jit(both).lower(q, k, v, some, dout).compile()
    flops = 4 * B * H * T * T * K / 2
    record = {}
    for n in document_counts:
        forward_ms = _milliseconds(forward, q, k, v, segments[n])
        both_ms = _milliseconds(total, q, k, v, segments[n], dout)
        record[f"{n} documents a row"] = {
            "forward_ms": round(forward_ms, 4), "forward_tflops": round(flops / forward_ms / 1e9, 1),
            "both_ms": round(both_ms, 4), "both_tflops": round(3.5 * flops / both_ms / 1e9, 1),
        }
    record["temporary_mb"] = round(total.memory_analysis().temp_size_in_bytes / 2**20, 1)
    record["copies"] = len(re.findall(r" (?:copy|transpose)\(", total.as_text()))
    return record


def _milliseconds(compiled, *args):
    """Median milliseconds a layer of the compiled chain."""
    for _ in range(2):
        jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(3):
            out = compiled(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / 3 / LAYERS * 1e3)
    return sorted(times)[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the record here, again after every candidate")
    parser.add_argument("--only", help="comma-separated parts of candidate names")
    parser.add_argument("--seconds", type=float, default=110, help="start no new measurement after this long")
    options = parser.parse_args()
    begin = time.perf_counter()
    names = [n for n in CANDIDATES if not options.only or any(part in n for part in options.only.split(","))]
    record = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "layers": LAYERS}
    record |= {"check": {}, "speed": {}}

    def measure(section, key, function):
        late = time.perf_counter() - begin > options.seconds
        try:
            record[section][key] = "not measured: out of time" if late else function()
        except Exception as problem:
            record[section][key] = reason(problem)
        record["seconds"] = round(time.perf_counter() - begin, 1)
        print(f"{record['seconds']:6.1f} s  {section}  {key}: {record[section][key]}", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(record, indent=1))

    for name in names:
        measure("check", name, partial(check, name))
    for shape_name, shape in SHAPES.items():
        first = shape == next(iter(SHAPES.values()))
        for name in names:
            if first or CANDIDATES[name][2]:
                # 64 documents are too many for `maxlm cudnn`'s ragged call: they time its way out
                counts = [n for n in ((1, 8, 64) if first else (1, 8)) if n < capacity(name)]
                measure("speed", f"{shape_name} | {name}", partial(speed, name, shape, counts))


if __name__ == "__main__":
    main()
