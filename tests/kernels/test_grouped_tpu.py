"""The TPU's grouped products: their code on a CPU against float64, and compiled for chips that are not there."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.kernels.grouped_matmul.mosaic_tpu import mosaic_tpu_matmul, tpu_product, tpu_weights

R = 384
FP8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)


def exact(x, w, g, sizes):
    """(y, dx, dw), rows behind the last group aside."""
    group = np.searchsorted(np.cumsum(sizes), np.arange(R), side="right")
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    padded = np.concatenate([w, np.zeros((1, *w.shape[1:]))])[group]
    dw = np.stack([x[group == e].T @ g[group == e] for e in range(len(sizes))])
    return np.einsum("rd,rdf->rf", x, padded), np.einsum("rf,rdf->rd", g, padded), dw


def close(got, wanted, tolerance=1e-5):
    return np.linalg.norm(np.asarray(got, np.float64) - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize(("sizes", "D", "F"), [
    ([100, 0, 31, 200], 128, 64), ([0, 0, 0, 0], 64, 64),
    pytest.param([0, 0, 384, 0], 64, 600, marks=pytest.mark.slow)], ids=str)
def test_products_and_gradients(sizes, D, F):
    """Groups that share a tile of rows, empty ones, one that takes all, a side that no tile divides, and NaN behind
    the last group."""
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((R, D), (4, D, F), (R, F)))
    held = (np.arange(R) < sum(sizes))[:, None]
    y, pull = jax.vjp(lambda x, w: mosaic_tpu_matmul(x, w, jnp.asarray(sizes, jnp.int32), True),
                      jnp.where(held, x, jnp.nan), w)
    wanted = exact(x, w, g, sizes)
    for got, want in zip((y, *pull(g)), wanted, strict=True):
        assert close(got, want)
    assert sum(sizes) == 0 or not close(pull(g)[1], np.roll(wanted[2], 1, axis=0))  # the twin


def test_8_bit_products():
    sizes, rng = [100, 0, 31, 200], np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), FP8[0]) for s in ((R, 128), (4, 64, 128)))
    g = jnp.asarray(rng.normal(size=(R, 64)), FP8[1])
    y, _, dw = exact(x, np.swapaxes(np.asarray(w, np.float64), 1, 2), g, sizes)
    n = jnp.asarray(sizes, jnp.int32)
    assert close(tpu_product(x, w, n, jnp.dtype("bfloat16"), turned=True, interpret=True), y, 2.0**-8)
    assert close(tpu_weights(x.T, g.T, n, jnp.dtype("float32"), rows_last=True, interpret=True), dw)


PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from maxlm.kernels.grouped_matmul.mosaic_tpu import mosaic_tpu_matmul, tpu_product, tpu_weights

device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
like = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
E4M3, E5M2, R, K, F, E = jnp.float8_e4m3fn, jnp.float8_e5m2, 2048, 1152, 2880, 8
flops = lambda f, *a: jax.jit(f).trace(*a, like(jnp.int32, E)).lower().compile().cost_analysis()["flops"] / (R * K * F)
whole = jax.grad(lambda x, w, n: mosaic_tpu_matmul(x, w, n).astype(jnp.float32).sum(), (0, 1))
forward = lambda x, w, n: tpu_product(x, w, n, jnp.dtype("bfloat16"), turned=True)
weights = lambda x, g, n: tpu_weights(x, g, n, jnp.dtype("float32"), rows_last=True)
print(json.dumps([flops(whole, like(jnp.bfloat16, R, K), like(jnp.bfloat16, E, K, F)),
                  flops(forward, like(E5M2, R, K), like(E4M3, E, F, K)),
                  flops(weights, like(E4M3, K, R), like(E5M2, F, R))]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "tpu7x:2x2x1"])
def test_they_compile_without_work_for_other_groups(topology):
    """Two gradients, and a product each; `lax.ragged_dot` counts every group's work for each row."""
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment = {**os.environ, **quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu",
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, topology], env=environment, capture_output=True, text=True,
                          timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.allclose(json.loads(done.stdout.splitlines()[-1]), [4, 2, 2], rtol=0.1)
