"""The experts' products of 8-bit floats against float64, for any loads, and on meshes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.kernels.grouped_matmul import Plan, collected_product, spread_products
from maxlm.kernels.grouped_matmul.blocks import BLOCK
from maxlm.kernels.grouped_matmul.eight_bit import grouped_product_8bit, grouped_weights_8bit
from maxlm.numerics import Fp8

FP8_STEP = 2.0**-4  # half a unit in the last place of E4M3, relative; E5M2's is twice that
SIZES = [[64, 0, 128, 64], [0, 0, 0, 0], [320, 0, 0, 0], [64, 64, 64, 64]]
R, D, F = 5 * BLOCK, 32, 48
RECIPES = [Fp8(jnp.dtype("float32"), "tensor"), Fp8(jnp.dtype("float32"), "row"),
           Fp8(jnp.dtype("bfloat16"), "tensor", power_of_two=True)]
NAMES = ["tensor", "row", "power of two"]


def groups(sizes):
    """The group of each row; len(sizes) behind the last."""
    return np.searchsorted(np.cumsum(sizes), np.arange(R), side="right")


def exact(x, w, g, group):
    """(y, dx, dw) in float64."""
    x, g = (np.where((group < len(w))[:, None], np.asarray(a, np.float64), 0) for a in (x, g))
    padded = np.concatenate([np.asarray(w, np.float64), np.zeros((1, *w.shape[1:]))])[group]
    dw = np.stack([x[group == e].T @ g[group == e] for e in range(len(w))])
    return np.einsum("rd,rdf->rf", x, padded), np.einsum("rf,rdf->rd", g, padded), dw


def relative_error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / (np.linalg.norm(want) or 1)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("implementation", ["blocks", "ragged_dot"])
def test_products_of_8_bit_values_are_exact_to_rounding(sizes, implementation):
    """Empty groups, one that takes all, and rows behind the last group that hold anything but NaN."""
    rng, group, E = np.random.default_rng(0), groups(sizes), len(sizes)
    draw = lambda dtype, *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    a, g = draw(jnp.float8_e4m3fn, R, D), draw(jnp.float8_e5m2, R, F)
    b = draw(jnp.float8_e4m3fn, E, F, D)
    y = grouped_product_8bit(((a, b),), jnp.asarray(sizes, jnp.int32), jnp.ones(E), implementation)
    dw = grouped_weights_8bit(a.T, g.T, jnp.asarray(sizes, jnp.int32), jnp.float32(1), implementation)
    wanted_y, _, wanted_dw = exact(a, np.swapaxes(np.asarray(b, np.float64), 1, 2), g, group)
    assert y.dtype == jnp.bfloat16 and relative_error(y, wanted_y) < 2.0**-8
    assert dw.dtype == jnp.float32 and relative_error(dw, wanted_dw) < 1e-5
    assert sum(sizes) == 0 or relative_error(dw, np.roll(wanted_dw, 1, axis=0)) > 0.1  # the twin


N, K = R // 2, 2  # tokens, and what each of them chose


def placed(sizes):
    """A plan with every row below sum(sizes) held by a choice, and of each row the token, N where it holds none."""
    choice = np.random.default_rng(1).permutation(R)
    held = np.arange(R) < sum(sizes)
    row_NK = np.where(held, np.arange(R), R)[np.argsort(choice)].reshape(N, K)
    plan = Plan(*(jnp.asarray(a, jnp.int32) for a in (np.where(held, choice, R), row_NK, sizes)))
    return plan, np.where(held, choice // K, N)


def in_rows(a, token):
    return np.concatenate([a, np.zeros_like(a[:1])])[token]


def by_token(rows, token):
    return np.stack([rows[token == n].sum(0) for n in range(N)])


def both(recipe, x, weights, gs, sizes):
    """Of tokens x [N, D] and of rows gs[0] [R, F]: what all products and gradients are as the recipe computes them,
    (ys, dx, dws) and (y, dx, dw)."""
    plan, cast = placed(sizes)[0], lambda a: jnp.asarray(a, recipe.dtype)

    @jax.jit
    def run(x, weights, gs):
        into = lambda x, weights: spread_products(recipe, "blocks", None, x, plan, weights)  # noqa: E731
        out = lambda h, weight: collected_product(recipe, "blocks", None, h, plan, weight)  # noqa: E731
        ys, pull = jax.vjp(into, x, weights)
        y, pull_out = jax.vjp(out, gs[0], jnp.swapaxes(weights[0], 1, 2))
        return (ys, *pull(gs)), (y, *pull_out(x))

    return run(cast(x), tuple(jnp.asarray(w, jnp.float32) for w in weights), tuple(map(cast, gs)))


def operands(seed=0):
    """x of tokens, two weights and two gradients of rows."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(size=(4, 1, 1)))  # matrices of different sizes
    return (rng.normal(size=(N, D)), [rng.normal(size=(4, D, F)) * spread for _ in range(2)],
            [rng.normal(size=(R, F)) for _ in range(2)])


@pytest.mark.parametrize("sizes", SIZES[::2], ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_products_and_gradients_are_within_the_formats_rounding(recipe, sizes):
    (x, ws, gs), group, token = operands(), groups(sizes), placed(sizes)[1]
    for rows in gs:
        rows[group == 4] = np.nan  # what is behind the last group is no one's
    (ys, dx, dws), (out, dh, dw_out) = both(recipe, x, ws, gs, sizes)
    rows = in_rows(x, token)
    wanted = [exact(rows, w, g, group) for w, g in zip(ws, gs, strict=True)]
    turned = exact(gs[0], np.swapaxes(ws[0], 1, 2), rows, group)
    pairs = [(dx, by_token(wanted[0][1] + wanted[1][1], token)),
             (out, by_token(turned[0], token)), (dh, turned[1]), (dw_out, turned[2])]
    for y, dw, (wanted_y, _, wanted_dw) in zip(ys, dws, wanted, strict=True):
        assert y.dtype == recipe.dtype and dw.dtype == jnp.float32
        pairs += [(y, wanted_y), (dw, wanted_dw)]
    for got, want in pairs:
        assert 0.1 * FP8_STEP < relative_error(got, want) < 1.5 * FP8_STEP  # the lower bound: it really is 8 bits
    assert relative_error(dws[0], np.roll(wanted[0][2], 1, axis=0)) > 10 * FP8_STEP  # the twin
    assert relative_error(out, np.roll(pairs[1][1], 1, axis=0)) > 10 * FP8_STEP


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=NAMES[:2])
def test_what_is_not_finite_comes_out_as_nan(recipe):
    (x, ws, gs), token = operands(), placed(SIZES[0])[1]
    x[token[70], 3] = np.inf
    ws[1][2, 0, 5] = np.nan  # of the group that row 70 is in
    (ys, _, dws), (_, dh, dw_out) = both(recipe, x, ws, gs, SIZES[0])
    assert np.isnan(np.asarray(ys[0])[70]).all() and np.isnan(np.asarray(ys[1])[70:190, 5]).all()
    assert np.isnan(np.asarray(dws[0])[2, 3]).all() and np.isnan(np.asarray(dw_out)[2, :, 3]).all()
    assert np.isnan(np.asarray(dh)[70]).all()
    others = (token[:64] != token[70])
    assert np.isfinite(np.asarray(ys[1])[:64][others]).all() if recipe.scaling == "row" else True


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=NAMES[:2])
def test_zeros_and_the_smallest_numbers_stay_finite(recipe):
    x, ws, gs = operands()
    for factor in (0, 1e-42, 1e-30):
        into, out = both(recipe, x * factor, ws, gs, SIZES[0])
        assert all(np.isfinite(a).all() for a in jax.tree.leaves((into, out)))
    wanted = exact(in_rows(x * 1e-30, placed(SIZES[0])[1]), ws[0], gs[0], groups(SIZES[0]))
    assert relative_error(into[0][0], wanted[0]) < 1.5 * FP8_STEP


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="this JAX multiplies E5M2 with E4M3 nowhere")
@pytest.mark.parametrize("recipe", RECIPES[:2], ids=NAMES[:2])
def test_tokens_move_to_their_rows_in_8_bits(recipe):
    """And are turned as such, on the way to the kernel for Hopper."""
    plan = Plan(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((512,), (128, 2), (4,))))
    x, w = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16), jax.ShapeDtypeStruct((4, 256, 128), jnp.float32)

    def loss(x, w, plan):
        h, = spread_products(recipe, "mosaic_gpu", None, x, plan, (w,))
        return jnp.sum(collected_product(recipe, "mosaic_gpu", None, h, plan, jnp.swapaxes(w, 1, 2)))

    recipe = dataclasses.replace(recipe, dtype=jnp.dtype("bfloat16"))
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=h100)):
        text = jax.jit(jax.grad(loss, (0, 1))).trace(x, w, plan).lower(lowering_platforms=("cuda",)).as_text()
    moved = re.findall(r"xla.gpu.triton.*: \(tensor<([0-9x]+)x(\w+)>", text)
    spread = [dtype for shape, dtype in moved if shape == "128x256"]
    assert spread.count("ui8") >= 2 and (set(spread) == {"ui8"} or recipe.scaling == "row")
    turned = [dtype for shape, dtype in moved if shape in ("1x512x256", "1x512x128")]
    assert len(turned) >= 3 and set(turned) == {"ui8"}
    assert ("tensor<256x512xui8>" in text) == (recipe.scaling == "tensor")  # turned on the way to the rows
