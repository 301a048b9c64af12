"""The experts' products of 8-bit floats against float64, for any loads, and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.kernels.grouped_matmul import expert_products
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


def all_three(recipe, x, weights, gs, sizes):
    """(ys, dx, dws) as the recipe computes them."""
    @jax.jit
    def run(x, weights, gs):
        multiply = lambda x, weights: expert_products(recipe, "blocks", None, x, weights, sizes)  # noqa: E731
        ys, pull = jax.vjp(multiply, x, weights)
        return ys, *pull(gs)

    sizes = jnp.asarray(sizes, jnp.int32)
    cast = lambda a: jnp.asarray(a, recipe.dtype)  # noqa: E731
    return run(cast(x), tuple(jnp.asarray(w, jnp.float32) for w in weights), tuple(map(cast, gs)))


def operands(seed=0):
    """x, two weights and two gradients; the rows behind the last group are NaN in the test that has such."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(size=(4, 1, 1)))  # matrices of different sizes
    return (rng.normal(size=(R, D)), [rng.normal(size=(4, D, F)) * spread for _ in range(2)],
            [rng.normal(size=(R, F)) for _ in range(2)])


@pytest.mark.parametrize("sizes", SIZES[::2], ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_products_and_gradients_are_within_the_formats_rounding(recipe, sizes):
    (x, ws, gs), group = operands(), groups(sizes)
    for rows in (x, *gs):
        rows[group == 4] = np.nan  # what is behind the last group is no one's
    ys, dx, dws = all_three(recipe, x, ws, gs, sizes)
    wanted = [exact(x, w, g, group) for w, g in zip(ws, gs, strict=True)]
    pairs = [(dx, wanted[0][1] + wanted[1][1])]
    for y, dw, (wanted_y, _, wanted_dw) in zip(ys, dws, wanted, strict=True):
        assert y.dtype == recipe.dtype and dw.dtype == jnp.float32
        pairs += [(y, wanted_y), (dw, wanted_dw)]
    for got, want in pairs:
        assert 0.1 * FP8_STEP < relative_error(got, want) < 1.5 * FP8_STEP  # the lower bound: it really is 8 bits
    assert relative_error(dws[0], np.roll(wanted[0][2], 1, axis=0)) > 10 * FP8_STEP  # the twin


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=NAMES[:2])
def test_what_is_not_finite_comes_out_as_nan(recipe):
    x, ws, gs = operands()
    x[70, 3] = np.inf
    ws[1][2, 0, 5] = np.nan  # of the group that row 70 is in
    ys, _, dws = all_three(recipe, x, ws, gs, SIZES[0])
    assert np.isnan(np.asarray(ys[0])[70]).all() and np.isnan(np.asarray(ys[1])[70:190, 5]).all()
    assert np.isnan(np.asarray(dws[0])[2, 3]).all()
    assert np.isfinite(np.asarray(ys[1])[:64]).all() if recipe.scaling == "row" else True


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=NAMES[:2])
def test_zeros_and_the_smallest_numbers_stay_finite(recipe):
    x, ws, gs = operands()
    for factor in (0, 1e-42, 1e-30):
        ys, dx, dws = all_three(recipe, x * factor, ws, gs, SIZES[0])
        assert all(np.isfinite(a).all() for a in (*ys, dx, *dws))
    wanted = exact(x * 1e-30, ws[0], gs[0], groups(SIZES[0]))
    assert relative_error(ys[0], wanted[0]) < 1.5 * FP8_STEP
