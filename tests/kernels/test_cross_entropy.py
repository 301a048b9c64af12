"""The fused head and cross-entropy against the textbook formula in float64."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.config import MeshConfig
from maxlm.kernels.cross_entropy import linear_cross_entropy, num_chunks, one_pass, two_passes
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import BATCH, SHARD, STREAM

B, T, D, V = 8, 8, 16, 40


def inputs():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    targets[2], targets[4, 3:] = -1, -1
    return x, w, targets


def textbook(x, w, targets, z_loss, softcap):
    """Loss, cross-entropy and gradients in float64, with the gradient of the soft cap and z-loss by hand."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    scores = x @ w.T
    logits = softcap * np.tanh(scores / softcap) if softcap else scores
    lse = np.log(np.exp(logits).sum(-1))
    counts = targets >= 0
    onehot = (np.arange(V) == targets[..., None]) * 1.0
    nll = ((lse - (onehot * logits).sum(-1)) * counts).sum()
    loss = nll + z_loss * (lse**2 * counts).sum()
    softmax = np.exp(logits - lse[..., None])
    dlogits = (softmax * (1 + 2 * z_loss * lse)[..., None] - onehot) * counts[..., None]
    dscores = dlogits * (1 - np.tanh(scores / softcap) ** 2) if softcap else dlogits
    return loss, nll, dscores @ w, np.einsum("btv,btd->vd", dscores, x)


def ours(x, w, targets, z_loss, softcap, chunks):
    def loss(x, w):
        sums = linear_cross_entropy(x, w, targets, z_loss, softcap, chunks)
        return sums.loss, sums.nll

    (value, nll), (dx, dw) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, w)
    return value, nll, dx, dw


def furthest(got, expected):
    return max(np.abs(np.asarray(a) - b).max() / (1 + np.abs(b).max()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("chunks", ["auto", 2, 8])
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, 0.0), (0.1, 5.0)])
def test_matches_the_textbook(z_loss, softcap, chunks):
    x, w, targets = inputs()
    expected = textbook(x, w, targets, z_loss, softcap)
    assert furthest(ours(x, w, targets, z_loss, softcap, chunks), expected) < 1e-6
    twin = textbook(x, w, targets, z_loss + 1e-3, softcap)
    assert furthest(ours(x, w, targets, z_loss, softcap, chunks), twin) > 1e-5


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(data=2, context=2, tensor=2), dict(fsdp=1, tensor=8)])
def test_a_mesh_gives_the_same_sums_and_gradients(sizes):
    x, w, targets = inputs()
    expected = textbook(x, w, targets, 0.1, 5.0)
    mesh = make_mesh(MeshConfig(**sizes))
    with jax.set_mesh(mesh):
        put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))  # noqa: E731
        got = ours(put(x, BATCH, STREAM, None), put(w, "tensor", SHARD), put(targets, BATCH, "context"), 0.1, 5.0, 2)
        assert furthest(got, expected) < 1e-6
        assert got[3].sharding.spec == P("tensor", SHARD)


@pytest.mark.parametrize("parts", [1, 4])
def test_one_pass_over_the_logits_finds_what_two_do(parts):
    """In parts along `tensor` too; rows of equal logits, of large ones, and without a target included."""
    logits = np.random.default_rng(0).normal(size=(2, T, V)).astype(np.float32) * 30
    logits[0, 0], logits[0, 1], logits[0, 2, :7] = -80, 1e30, -np.inf
    targets = np.random.default_rng(1).integers(-1, V, (2, T)).astype(np.int32)
    targets[0, 3] = -1

    def found(how, logits):
        if parts == 1:
            return how(logits, targets, None)
        part = lambda a: how(a, targets - jax.lax.axis_index("tensor") * a.shape[-1], "tensor")  # noqa: E731
        return jax.jit(jax.shard_map(part, in_specs=P(None, None, "tensor"), out_specs=P()))(logits)

    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    with jax.set_mesh(mesh) if parts > 1 else contextlib.nullcontext():
        given = jax.device_put(logits, NamedSharding(mesh, P(None, None, "tensor"))) if parts > 1 else logits
        wanted, got, twin = found(two_passes, given), found(one_pass, given), found(one_pass, given + 1e-3)
    same = lambda one, other: all(np.allclose(a, b, rtol=1e-5) for a, b in zip(one, other, strict=True))  # noqa: E731
    assert same(got, wanted) and not same(twin, wanted)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_pass_leaves_no_finite_loss_of_bad_logits(bad):
    peak, mass, gold = one_pass(jnp.zeros((1, 1, V)).at[0, 0, 3].set(bad), jnp.zeros((1, 1), jnp.int32), None)
    assert not np.isfinite(peak + jnp.log(mass) - gold).any()


def test_bfloat16_keeps_float32_sums():
    x, w, targets = inputs()
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), np.asarray(jnp.asarray(w, jnp.bfloat16), np.float32)
    loss, *_ = ours(jnp.asarray(x, jnp.bfloat16), w, targets, 0.0, 0.0, 2)
    expected, *_ = textbook(*rounded, targets, 0.0, 0.0)
    assert abs(float(loss) - expected) < 1e-5 * expected


def test_chunks_bound_the_logits():
    assert num_chunks(8, 4096, 128_256) == 8
    assert num_chunks(1, 128, 4096) == 1
    assert num_chunks(64, 7, 2**30) == 7
