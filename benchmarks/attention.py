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
import sys
import time
from functools import partial
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


def tokamax_causal(q, k, v, segments, window):
    import tokamax

    sizes = None if window is None else (window - 1, 0)
    return tokamax.dot_product_attention(q, k, v, is_causal=True, local_window_size=sizes, implementation="mosaic")


def tokamax_packed(q, k, v, segments, window):
    """The first key of each query's document as `k_start`, which the Mosaic kernel prunes by."""
    from tokamax._src.ops.attention.base import Mask  # the public function takes no k_start
    from tokamax.ops.gpu import PallasMosaicFlashAttention

    T = q.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)[None]
    begins = jnp.ones(segments.shape, bool).at[:, 1:].set(segments[:, 1:] != segments[:, :-1])
    start = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    if window is not None:
        start = jnp.maximum(start, index - (window - 1))
    return PallasMosaicFlashAttention()(q, k, v, mask=Mask(k_start=start[:, None], is_causal=True))


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


def errors(name, documents, window):
    """Largest differences from the reference over real tokens, out and the three gradients, of its largest value."""
    shape = (2, 1024, 8, 2, 64)
    q, k, v, dout = inputs(*shape)
    segments = rows(shape[0], shape[1], documents)
    dout = dout * (segments > 0)[:, :, None, None]  # nothing is asked of padding
    got = _value_and_grads(lambda q, k, v, s: bound(name)(q, k, v, s, window), q, k, v, segments, dout)
    cpu = jax.devices("cpu")[0]
    args = [jax.device_put(x.astype(jnp.float32), cpu) for x in (q, k, v)]
    want = _value_and_grads(
        partial(reference_attention, window=window, softcap=0.0, scale=shape[-1] ** -0.5),
        *args, jax.device_put(segments, cpu), jax.device_put(dout.astype(jnp.float32), cpu),
    )
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
    for documents in (1, 7, 40):
        for window in (None, 200):
            label = f"{documents} documents" + (f", window {window}" if window else "")
            if documents >= capacity(name):
                record[label] = "more documents than it is compiled for"
                continue
            try:
                worst = max(errors(name, documents, window))
            except Exception as problem:
                record[label] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:160]}"
                continue
            should_match = exact or documents == 1
            record[label] = {"error": worst, "ok": (worst < TOLERANCE) == should_match, "matches": worst < TOLERANCE}
    return record


# --- speed ---


def speed(name, shape, documents):
    B, T, H, G, K = shape
    q, k, v, dout = inputs(*shape)
    segments = rows(B, T, documents)
    attend = bound(name)

    def chain(q, k, v, segments):
        for _ in range(LAYERS):
            q = attend(q, k, v, segments, None)
        return q

    def both(q, k, v, segments, dout):
        out, pull = jax.vjp(lambda q, k, v: chain(q, k, v, segments), q, k, v)
        return (out, *pull(dout))

    flops = 4 * B * H * T * T * K / 2
    forward, _ = _milliseconds(chain, q, k, v, segments)
    total, temporary = _milliseconds(both, q, k, v, segments, dout)
    return {
        "forward_ms": round(forward, 4), "forward_tflops": round(flops / forward / 1e9, 1),
        "both_ms": round(total, 4), "both_tflops": round(3.5 * flops / total / 1e9, 1),
        "temporary_mb": round(temporary / 2**20, 1),
    }


def _milliseconds(function, *args):
    """(median milliseconds a layer, temporary bytes) of the compiled chain."""
    compiled = jax.jit(function).lower(*args).compile()
    for _ in range(2):
        jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(3):
            out = compiled(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / 3 / LAYERS * 1e3)
    return sorted(times)[2], compiled.memory_analysis().temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--only", help="comma-separated parts of candidate names")
    parser.add_argument("--seconds", type=float, default=110, help="start no new measurement after this long")
    options = parser.parse_args()
    begin = time.perf_counter()
    names = [n for n in CANDIDATES if not options.only or any(part in n for part in options.only.split(","))]
    record = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "layers": LAYERS}
    record |= {"check": {}, "speed": {}}
    for name in names:
        record["check"][name] = check(name)
        print(f"check  {name}: {record['check'][name]}", flush=True)
    for shape_name, shape in SHAPES.items():
        first = shape == next(iter(SHAPES.values()))
        for name in names:
            for documents in (1, 8, 64) if first else (1, 8):
                key = f"{shape_name} | {name} | {documents} documents a row"
                if not (first or CANDIDATES[name][2]) or documents >= capacity(name):
                    continue
                if documents > 1 and not CANDIDATES[name][1]:
                    continue
                if time.perf_counter() - begin > options.seconds:
                    record["speed"][key] = "not measured: out of time"
                    continue
                try:
                    record["speed"][key] = speed(name, shape, documents)
                except Exception as problem:
                    record["speed"][key] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:160]}"
                print(f"speed  {key}: {record['speed'][key]}", flush=True)
    record["seconds"] = round(time.perf_counter() - begin, 1)
    print(f"{record['seconds']} s")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
