"""Looking up tokens, and the gradient of doing so, on one device and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.config import MeshConfig
from maxlm.kernels.embedding import embedding_lookup, sum_by_row
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import BATCH, SHARD, STREAM

V, D, B, T = 16, 8, 8, 8


def inputs():
    rng = np.random.default_rng(0)
    return rng.normal(size=(V, D)).astype(np.float32), rng.integers(0, V, (B, T)).astype(np.int32)


def value_and_gradient(table, tokens, weights, dtype):
    """Rows looked up, and the gradient of their sum weighted by `weights`."""

    def loss(table):
        rows = embedding_lookup(table, tokens, dtype)
        return jnp.sum(rows.astype(jnp.float32) * weights), rows

    (_, rows), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(table)
    return rows, gradient


@pytest.mark.parametrize("sizes", [None, dict(fsdp=8), dict(data=2, context=2, tensor=2), dict(fsdp=1, tensor=8)],
                         ids=str)
def test_rows_and_gradient(sizes):
    table, tokens = inputs()
    weights = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
    expected = np.zeros((V, D))
    np.add.at(expected, tokens, weights)
    if sizes is None:
        rows, gradient = value_and_gradient(table, tokens, weights, jnp.float32)
    else:
        mesh = make_mesh(MeshConfig(**sizes))
        with jax.set_mesh(mesh):
            put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))  # noqa: E731
            rows, gradient = value_and_gradient(put(table, "tensor", SHARD), put(tokens, BATCH, "context"),
                                                put(weights, BATCH, STREAM, None), jnp.float32)
            assert gradient.sharding.spec == P("tensor", SHARD)
    assert (np.asarray(rows) == table[tokens]).all()
    assert np.abs(np.asarray(gradient) - expected).max() < 1e-5
    np.add.at(expected, tokens[:1, :1], 1e-3)  # the twin: one token more
    assert np.abs(np.asarray(gradient) - expected).max() > 1e-4


def test_a_frequent_token_keeps_its_gradient_in_bfloat16():
    table, tokens = np.zeros((V, D), np.float32), np.full((64, 64), 3, np.int32)
    rows, gradient = value_and_gradient(table, tokens, np.ones((64, 64, D), np.float32), jnp.bfloat16)
    assert rows.dtype == jnp.bfloat16
    assert (np.asarray(gradient)[3] == 4096).all()
    naive = jax.grad(lambda t: jnp.sum(t.astype(jnp.bfloat16)[tokens].astype(jnp.float32)))(table)
    assert np.asarray(naive)[3, 0] < 4000  # what this module is for


@pytest.mark.parametrize(("count", "rows"), [(96, 7), (33, 40), (1024, 3), (512, 1), (256, 600)])
def test_sum_by_row(count, rows):
    """Rows that span blocks, that are never named, that are out of range, and counts that no block divides."""
    rng = np.random.default_rng(count)
    values = rng.normal(size=(count, 5)).astype(np.float32)
    named = (rng.integers(0, rows + 2, count) ** 2 // (rows + 2)).astype(np.int32)
    expected = np.zeros((rows + 2, 5))
    np.add.at(expected, named, values)
    sums = np.asarray(jax.jit(sum_by_row, static_argnums=2)(values, named, rows))
    assert np.abs(sums - expected[:rows]).max() < 2e-5
    np.add.at(expected, named[-1:] * 0, 1e-3)  # the twin: one value more
    assert np.abs(sums - expected[:rows]).max() > 5e-4
