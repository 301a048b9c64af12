"""Digests are the same on any mesh and change with any word, name or place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.config import MeshConfig
from maxlm.parallel.mesh import make_mesh
from maxlm.training.digest import array_digest, hex_digest, row_digests, tree_digest

digest_of = jax.jit(array_digest)


def arrays(seed=0):
    draw = np.random.default_rng(seed)
    return {"a": draw.normal(size=(8, 12)).astype(np.float32), "b": draw.integers(0, 9, (16,)).astype(np.int32),
            "c": jnp.asarray(draw.normal(size=(4, 2)), jnp.bfloat16), "d": draw.integers(0, 2, (5,)).astype(bool)}


def test_digest_is_the_same_on_any_mesh():
    digest, found = jax.jit(tree_digest), set()
    for axes in ({"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4}):
        mesh = make_mesh(MeshConfig(**{"fsdp": 1} | axes), jax.devices()[: int(np.prod(list(axes.values())))])
        with jax.set_mesh(mesh):
            tree = arrays()
            for name, layout in (("a", P("fsdp", "tensor")), ("b", P(("data", "fsdp"))), ("c", P(None, "tensor"))):
                tree[name] = jax.device_put(tree[name], NamedSharding(mesh, layout))
            found.add(hex_digest(digest(tree)))
    assert len(found) == 1 and len(found.pop()) == 16


def test_one_bit_changes_it():
    base = arrays()["a"]
    digests = {hex_digest(digest_of(base))}
    for place in (0, 5, 95):
        for bit in (0, 17, 31):
            flipped = base.copy()
            flipped.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << bit)
            digests.add(hex_digest(digest_of(flipped)))
    assert len(digests) == 10


@pytest.mark.parametrize("change", [
    lambda a: {**a, "a": a["a"][::-1]},
    lambda a: {**a, "a": a["a"].reshape(12, 8).T},
    lambda a: {**a, "a": -a["a"]},
    lambda a: {**{k: v for k, v in a.items() if k != "b"}, "e": a["b"]},
    lambda a: {**a, "c": a["c"].at[0, 0].add(1)},
    lambda a: {**a, "d": ~a["d"]},
], ids=["rows moved", "transposed", "sign", "renamed", "bfloat16", "bool"])
def test_anything_else_changes_it_too(change):
    digest = jax.jit(tree_digest)
    assert hex_digest(digest(arrays())) == hex_digest(digest(arrays()))
    assert hex_digest(digest(arrays())) != hex_digest(digest(change(arrays())))


def test_zeros_of_another_sign_and_nans_count_as_bits():
    words = np.array([0, 0x80000000, 0x7FC00000, 0x7FC00001], np.uint32)  # 0, -0, two NaNs
    assert len({hex_digest(digest_of(np.full(3, word).view(np.float32))) for word in words}) == 4


def test_a_row_keeps_its_digest_when_it_moves():
    x = np.random.default_rng(0).normal(size=(8, 3, 4)).astype(np.float32)
    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
        rows = np.asarray(jax.jit(row_digests)(split))
    np.testing.assert_array_equal(np.asarray(jax.jit(row_digests)(np.roll(x, 3, axis=0))), np.roll(rows, 3, axis=0))
    assert len({tuple(row) for row in rows.tolist()}) == 8


def test_elements_of_eight_bytes_are_refused():
    with pytest.raises(TypeError, match="8 bytes"):
        array_digest(np.zeros(3, np.float64))
