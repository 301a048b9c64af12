"""Every recipe's product and both gradients against float64, on inputs that were chosen to break them."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlm.config import PrecisionConfig
from maxlm.numerics import numerics_of

RECIPES = typing.get_args(typing.get_type_hints(PrecisionConfig)["recipe"])
X, W, G = (2, 16, 160), (160, 64), (2, 16, 64)
# Of a format: half a unit in the last place, relative; half its smallest number over half its largest.
FORMATS = {"e4m3": (2.0**-4, 2.0**-10 / 224), "e5m2": (2.0**-3, 2.0**-17 / 28672), "bf16": (0.0, 0.0)}
OPERANDS = {"float32": ("bf16",) * 3, "bf16": ("bf16",) * 3, "fp8": ("e4m3", "e4m3", "e5m2"),
            "fp8_rowwise": ("e4m3", "e4m3", "e5m2"), "fp8_block": ("e4m3",) * 3}


def ordinary():
    """x, w, g: numbers that bfloat16 has."""
    rng = np.random.default_rng(0)
    return [np.array(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float64) for shape in (X, W, G)]


def changed(operand, change):
    arrays = ordinary()
    arrays[operand] = change(arrays[operand])
    return arrays


def with_one(value):
    def change(a):
        a = a.copy()
        a[(1,) * a.ndim] = value
        return a

    return change


# A large number where all others are small, nothing but zeros, numbers below float32's normal ones, all sizes at once.
CHANGES = {"an outlier": with_one(1e4), "a negative outlier": with_one(-1e4), "zeros": np.zeros_like,
           "subnormals": lambda a: a * 2.0**-133, "tiny": lambda a: a * 2.0**-60,
           "all sizes": lambda a: a * 2.0 ** np.random.default_rng(1).integers(-20, 10, a.shape)}


@functools.cache
def compiled(recipe):
    numerics = numerics_of(PrecisionConfig(recipe=recipe))

    @jax.jit
    def products(x, w, g):
        multiply = lambda x, w: numerics.mlp.einsum(  # noqa: E731
            "BTD,DF->BTF", x, nnx.Param(w, dims=("embed", "mlp")), ("batch", None, "mlp"))
        y, pull = jax.vjp(multiply, x.astype(numerics.dtype), w)
        return y, *pull(g.astype(numerics.dtype))

    return products


def products(recipe, arrays):
    return [np.asarray(a, np.float64) for a in compiled(recipe)(*(jnp.asarray(a, jnp.float32) for a in arrays))]


def exact(x, w, g):
    return np.einsum("btd,df->btf", x, w), np.einsum("btf,df->btd", g, w), np.einsum("btd,btf->df", x, g)


def bounds(recipe, arrays):
    """What each result may be off: by the rounding of its operands, where one scale serves all, and its own."""
    sizes = [np.abs(a) for a in arrays]
    off = []
    for size, kind in zip(sizes, OPERANDS[recipe], strict=True):
        relative, absolute = FORMATS[kind]
        off.append(np.maximum(relative * size, absolute * size.max()))
    # Each result is linear in two operands: (a + da)(b + db) - ab.
    whole, alone = exact(*(s + d for s, d in zip(sizes, off, strict=True))), exact(*sizes)
    return [w - a + 2.0**-6 * a + 2.0**-126 * 2000 for w, a in zip(whole, alone, strict=True)]


@pytest.mark.parametrize("operand", [0, 1, 2], ids=["x", "w", "g"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_results_are_off_by_what_their_formats_explain(recipe, operand):
    for name, change in CHANGES.items():
        arrays = changed(operand, change)
        for got, want, bound in zip(products(recipe, arrays), exact(*arrays), bounds(recipe, arrays), strict=True):
            assert (np.abs(got - want) <= bound).all(), name
    arrays = ordinary()
    other = [arrays[0], np.roll(arrays[1], 1, axis=0), arrays[2]]
    assert (np.abs(products(recipe, other)[0] - exact(*arrays)[0]) > bounds(recipe, arrays)[0]).mean() > 0.1, "a twin"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_finite_never_comes_out_finite(recipe, value):
    """Wherever float64 gives NaN or infinity; as NaN in 8 bits."""
    for operand in range(3):
        arrays = changed(operand, with_one(value))
        with np.errstate(invalid="ignore"):
            wanted = exact(*arrays)
        for got, want in zip(products(recipe, arrays), wanted, strict=True):
            spoilt = got[~np.isfinite(want)]
            assert np.isnan(spoilt).all() if recipe.startswith("fp8") else not np.isfinite(spoilt).any()
