"""The sparse layer on a mesh under any imbalance, and what a buffer that is too small leaves out."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from maxlm.config import MeshConfig, ModelConfig, MoEConfig, PrecisionConfig
from maxlm.kernels.grouped_matmul import has_swiglu
from maxlm.model.moe.layer import MoE
from maxlm.numerics import FLOAT32, Fp8, numerics_of
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import BATCH, STREAM, stored
from tests.training.test_moe import emulated

B, T, D, E, K = 8, 6, 16, 8, 2
BIAS = {"even": np.zeros(E), "two experts take all": np.eye(E)[2] * 9 + np.eye(E)[5] * 9,
        "one device has no expert of them": np.where(np.arange(E) < 6, 9.0, 0)}


def layer(exchange="all_to_all", bias="even", **moe) -> MoE:
    config = ModelConfig(num_layers=1, hidden_dim=D, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16,
                         vocab_size=8, num_experts=E, experts_per_token=K, expert_dim=16, init_std=0.5,
                         moe=MoEConfig(scores="sigmoid", bias_rate=1e-2, **moe))
    made = MoE(config, "blocks", exchange, nnx.Rngs(params=jax.random.key(0)))
    made.selection_bias[...] = jnp.asarray(BIAS[bias], jnp.float32)
    return made


def inputs():
    x, g = np.random.default_rng(0).normal(size=(2, B, T, D)).astype(np.float32)
    return x, g, np.ones((B, T), np.int32)


def hidden(made: MoE, x: np.ndarray, seen: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(chosen experts [B, T, K], their weighted hidden units [B, T, K, F]) by the formula in numpy. seen: what experts
    see in place of x."""
    logits = x @ np.asarray(made.router[...])
    score = 1 / (1 + np.exp(-logits))
    chosen = np.argsort(-(score + np.asarray(made.selection_bias[...])), axis=-1, kind="stable")[..., :K]
    weight = np.take_along_axis(score, chosen, -1)
    weight /= weight.sum(-1, keepdims=True)
    g, u = (np.einsum("btd,btkdf->btkf", x if seen is None else seen, np.asarray(w[...])[chosen])
            for w in (made.gate, made.up))
    return chosen, weight[..., None] * g / (1 + np.exp(-g)) * u


def by_token(made: MoE, x: np.ndarray, seen: np.ndarray | None = None) -> np.ndarray:
    """[B, T, K, D]: what each chosen expert gives, already weighted."""
    chosen, units = hidden(made, x, seen)
    return np.einsum("btkf,btkfd->btkd", units, np.asarray(made.down[...])[chosen])


def on_mesh(made: MoE, numerics=FLOAT32, **axes):
    """(output, load, gradients of sum(output * g) in x and all weights) on 8 devices."""
    x, g, ids = inputs()
    mesh = make_mesh(MeshConfig(**axes))
    with jax.set_mesh(mesh):
        rows = lambda a: jax.device_put(a, jax.NamedSharding(mesh, P(BATCH, STREAM if a.ndim > 2 else "context")))  # noqa: E731
        made = jax.tree.map(jax.device_put, made, stored(made, mesh))

        def loss(made, x):
            out, load = made(x, rows_ids, numerics, None)
            return jnp.sum(out * rows_g), (out, load)

        rows_ids, rows_g = rows(ids), rows(g)
        (_, (out, load)), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(made, rows(x))
        return np.asarray(out), jax.device_get(load), [np.asarray(a) for a in jax.tree.leaves(grads)]


@functools.cache
def alone(bias, numerics=FLOAT32):
    """Output and gradients without a mesh."""
    x, g, ids = inputs()
    loss = lambda made, x: (lambda out: (jnp.sum(out * g), out))(made(x, ids, numerics, None)[0])  # noqa: E731
    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(layer(bias=bias), jnp.asarray(x))
    return np.asarray(out), [np.asarray(a) for a in jax.tree.leaves(grads)]


def test_the_layer_is_its_formula():
    made, (out, _) = layer(), alone("even")
    assert np.allclose(out, by_token(made, inputs()[0]).sum(2), atol=1e-4)
    assert not np.allclose(out, by_token(made, inputs()[0])[:, :, 0], atol=1e-2)  # the twin: one expert less


@pytest.mark.parametrize(("bias", "exchange"), [
    ("two experts take all", "all_to_all"), ("one device has no expert of them", "all_gather"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("even", "all_to_all"), ("two experts take all", "all_gather"),
        ("one device has no expert of them", "all_to_all")))])
def test_any_imbalance_gives_the_right_answer(bias, exchange):
    out, load, grads = on_mesh(layer(exchange, bias), expert=4, tensor=2)
    wanted, wanted_grads = alone(bias)
    assert np.allclose(wanted, by_token(layer(bias=bias), inputs()[0]).sum(2), atol=1e-4)
    assert load.dropped == 0 and load.chosen_E.sum() == B * T * K
    if bias == "two experts take all":
        assert load.chosen_E.tolist() == [0, 0, B * T, 0, 0, B * T, 0, 0]
    assert np.allclose(out, wanted, atol=1e-4)
    for a, b in zip(grads, wanted_grads, strict=True):
        assert np.allclose(a, b, atol=2e-4)


@pytest.mark.parametrize(("exchange", "moe"), [
    ("all_to_all", dict(buffer_factor=0.5)),
    pytest.param("all_gather", dict(capacity_factor=0.25), marks=pytest.mark.slow),
    pytest.param("all_to_all", dict(capacity_factor=0.5), marks=pytest.mark.slow)])
def test_what_finds_no_room_is_left_out_counted_and_harms_nothing_else(exchange, moe):
    """Every token gets the sum of those of its experts that had room, exactly as many as were not counted out."""
    made = layer(exchange, "two experts take all", **moe)
    out, load, grads = on_mesh(made, expert=4, fsdp=2)
    parts = by_token(made, inputs()[0])
    kept = 0
    for got, (one, two) in zip(out.reshape(-1, D), parts.reshape(-1, K, D), strict=True):
        sums = ((0, 0 * one), (1, one), (1, two), (2, one + two))
        fits = [n for n, sum_ in sums if np.allclose(got, sum_, atol=1e-4)]
        assert len(fits) == 1, "a token has something that is none of its experts'"
        kept += fits[0]
    assert 0 < load.dropped == B * T * K - kept
    assert all(np.isfinite(a).all() for a in grads)


@pytest.mark.parametrize(("changes", "moe", "fused"), [
    ({}, {}, True), ({"activation": "geglu"}, {}, False), ({}, {"expert_bias": True}, False)])
def test_which_experts_make_their_units_inside_of_products(changes, moe, fused):
    """On Hopper, traced and not run: SwiGLU's in bfloat16, without biases, and no others'."""
    made = layer(**moe)
    config = dataclasses.replace(made.config, hidden_dim=128, expert_dim=128, **changes)
    made = MoE(config, "mosaic_gpu", "all_gather", nnx.Rngs(params=jax.random.key(0)))
    numerics, eight_bit = (numerics_of(PrecisionConfig(recipe=recipe), "gpu") for recipe in ("bf16", "fp8"))
    assert has_swiglu(numerics.experts, "mosaic_gpu") and not has_swiglu(eight_bit.experts, "mosaic_gpu")
    x, ids = jax.ShapeDtypeStruct((2, 64, 128), jnp.bfloat16), jax.ShapeDtypeStruct((2, 64), jnp.int32)
    loss = lambda made, x, ids: jnp.sum(made(x, ids, numerics, None)[0].astype(jnp.float32))  # noqa: E731
    traced = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(made, x, ids))
    assert [name in traced for name in ("name=gated_product", "name=gated_gradients")] == [fused, fused]
    assert "name=grouped_product" in traced and "name=grouped_weights" in traced


def in_8_bits(scaling):
    return dataclasses.replace(FLOAT32, experts=Fp8(jnp.dtype("float32"), scaling))


def apart(got, wanted):
    """The largest relative distance of output and gradients."""
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(
        (got[0], *got[-1]), (wanted[0], *wanted[-1]), strict=True) if np.any(b))


MESHES = [("tensor", dict(expert=4, tensor=2), "all_to_all"), ("row", dict(expert=2, fsdp=2, tensor=2), "all_to_all"),
          ("tensor", dict(expert=2, fsdp=2, context=2), "all_to_all"), ("row", dict(expert=4, context=2), "all_gather"),
          ("tensor", dict(expert=2, fsdp=2, tensor=2), "all_gather"), ("row", dict(fsdp=4, tensor=2), "all_to_all")]


@pytest.mark.parametrize(("scaling", "axes", "exchange"), [
    MESHES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in MESHES[1:])])
def test_experts_in_8_bits_are_the_same_on_any_mesh(scaling, axes, exchange):
    """Scales are of the whole; partial products are rounded to bfloat16, as everywhere in the FP8 recipes."""
    wanted = alone("even", in_8_bits(scaling))
    assert 0.02 < apart(wanted, alone("even")) < 0.2  # it is 8 bits
    assert apart(on_mesh(layer(exchange), in_8_bits(scaling), **axes), wanted) < 0.01


@pytest.mark.slow
def test_the_comparison_sees_scales_of_a_devices_own(monkeypatch):
    """The twin of the test above."""
    monkeypatch.setattr(jax.lax, "pmax", lambda x, axes: x)
    assert apart(on_mesh(layer(), in_8_bits("tensor"), expert=4, tensor=2), alone("even", in_8_bits("tensor"))) > 0.02


def jaxpr_of_gradients(made, numerics, **axes) -> str:
    mesh = make_mesh(MeshConfig(**axes))
    with jax.set_mesh(mesh):
        made = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), made, stored(made, mesh))
        x, ids = (jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, P(BATCH, "context")))
                  for shape, dtype in (((B, T, D), jnp.float32), ((B, T), jnp.int32)))
        loss = lambda made, x, ids: jnp.sum(made(x, ids, numerics, None)[0])  # noqa: E731
        return str(jax.jit(jax.grad(loss, (0, 1))).trace(made, x, ids).jaxpr)


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_experts_weights_are_gathered_in_8_bits(scaling):
    jaxpr = jaxpr_of_gradients(layer(), in_8_bits(scaling), expert=2, fsdp=4)
    gathered = re.findall(r":(\w+)\[4,16,16\]\S* = all_gather", jaxpr)
    assert set(gathered) == {"f8_e4m3fn"} and len(gathered) == (3 if scaling == "tensor" else 6)


TRAVELLING = dataclasses.replace(FLOAT32, fp8_exchange=True)


def rounded(x: np.ndarray, dtype) -> np.ndarray:
    """x as 8-bit floats hold it, each row scaled by the largest power of two that fits."""
    most = float(jnp.finfo(dtype).max)
    scale = 2 ** np.floor(np.log2(most / np.abs(x).max(-1, keepdims=True)))
    return np.asarray(jnp.asarray(x * scale, dtype).astype(jnp.float32)) / scale


@pytest.mark.parametrize("exchange", ["all_to_all", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("all_gather", "ragged_all_to_all"))])
def test_tokens_travel_in_8_bits_and_so_do_gradients_of_results(exchange, monkeypatch):
    """The router sees tokens as they are, experts as E4M3 holds them; their gradients are those of E5M2."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    (x, g, _), made = inputs(), layer(exchange)
    out, load, grads = on_mesh(made, TRAVELLING, expert=4, tensor=2)
    seen = rounded(x, jnp.float8_e4m3fn)
    assert load.dropped == 0 and np.allclose(out, by_token(made, x, seen).sum(2), atol=1e-4)
    assert not np.allclose(out, by_token(made, x).sum(2), atol=1e-3)  # the twin: nothing rounded
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(made)[0]]
    got, (chosen, units) = grads[next(i for i, path in enumerate(paths) if "down" in path)], hidden(made, x, seen)
    wanted, twin = (np.stack([np.einsum("btkf,btd->fd", np.where((chosen == e)[..., None], units, 0), a)
                              for e in range(E)]) for a in (rounded(g, jnp.float8_e5m2), g))
    assert np.allclose(got, wanted, atol=1e-4) and not np.allclose(got, twin, atol=1e-3)


def test_half_of_what_travels_is_bytes():
    jaxpr = jaxpr_of_gradients(layer(), TRAVELLING, expert=8)
    moved = re.findall(r":(\w+)\[\d+,16\]\S* = all_to_all", jaxpr)
    assert sorted(moved) == ["f32", "f32", "u8", "u8"]
