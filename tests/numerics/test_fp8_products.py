"""FP8 products against float64, on what they meet and on what they must survive."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from maxlm.config import PrecisionConfig
from maxlm.numerics import Fp8, numerics_of
from maxlm.parallel.sharding import ACTIVATION, STORAGE, spec
from maxlm.training.compiled_products import slow_products

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
FP8_STEP = 2.0**-4  # half a unit in the last place of E4M3, relative; E5M2's is twice that
CASES = {"attention in": ("BTD,DGRK->BTGRK", (4, 16, 32), (32, 2, 3, 8), ("embed", "kv_heads", None, None),
                          ("batch", "length", "kv_heads", None, None)),
         "attention out": ("BTHK,HKD->BTD", (4, 16, 4, 8), (4, 8, 32), ("heads", None, "embed"),
                           ("batch", "stream", None)),
         "mlp": ("BTD,DF->BTF", (4, 16, 32), (32, 64), ("embed", "mlp"), ("batch", "length", "mlp"))}
RECIPES = [Fp8(jnp.dtype("float32"), "tensor"), Fp8(jnp.dtype("float32"), "row"),
           Fp8(jnp.dtype("float32"), "tensor", power_of_two=True),
           Fp8(jnp.dtype("float32"), "tensor", scaled_operands=True)]
NAMES = ["tensor", "row", "power of two", "scaled operands"]


def operands(case, seed=0):
    subscripts, x_shape, w_shape, dims, out = CASES[case]
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=x_shape), rng.normal(size=w_shape) / 8
    return subscripts, x, w, dims, out


def products(recipe, subscripts, x, w, g, dims, out):
    """(y, dx, dw) as the recipe computes them."""
    @jax.jit
    def all_three(x, w, g):
        multiply = lambda x, w: recipe.einsum(subscripts, x, nnx.Param(w, dims=dims), out)  # noqa: E731
        y, pull = jax.vjp(multiply, x, w)
        return y, *pull(g)

    return all_three(*(jnp.asarray(a, jnp.float32) for a in (x, w, g)))


def exact(subscripts, x, w, g):
    operands, y = subscripts.split("->")
    a, b = operands.split(",")
    return np.einsum(subscripts, x, w), np.einsum(f"{y},{b}->{a}", g, w), np.einsum(f"{a},{y}->{b}", x, g)


def relative_error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
@pytest.mark.parametrize("case", list(CASES))
def test_product_and_gradients_are_within_the_formats_rounding(case, recipe):
    subscripts, x, w, dims, out = operands(case)
    g = np.random.default_rng(1).normal(size=np.einsum(subscripts, x, w).shape)
    for got, want in zip(products(recipe, subscripts, x, w, g, dims, out), exact(subscripts, x, w, g), strict=True):
        assert got.dtype == jnp.float32 and got.shape == want.shape
        assert 0.1 * FP8_STEP < relative_error(got, want) < 1.5 * FP8_STEP  # the lower bound: it really is 8 bits


def test_a_perturbed_twin_is_beyond_the_bound():
    subscripts, x, w, dims, out = operands("mlp")
    g = np.ones(np.einsum(subscripts, x, w).shape)
    y = products(RECIPES[0], subscripts, x, np.roll(w, 1, axis=0), g, dims, out)[0]
    assert relative_error(y, exact(subscripts, x, w, g)[0]) > 10 * FP8_STEP


def test_an_outlier_costs_its_own_row_alone_where_each_row_has_a_scale():
    subscripts, x, w, dims, out = operands("mlp")
    x *= 0.01
    x[0, 0, 0] = 1e4
    errors = {}
    for name, recipe in zip(NAMES, RECIPES, strict=True):
        y = products(recipe, subscripts, x, w, np.ones((4, 16, 64)), dims, out)[0]
        assert np.isfinite(y).all()
        errors[name] = relative_error(y[1:], np.einsum(subscripts, x, w)[1:])
    assert errors["row"] < 1.5 * FP8_STEP and errors["tensor"] > 0.2


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_zeros_and_the_smallest_numbers_stay_finite(recipe):
    subscripts, x, w, dims, out = operands("mlp")
    g = np.ones((4, 16, 64))
    for got in products(recipe, subscripts, 0 * x, w, g, dims, out):
        assert np.isfinite(got).all()
    assert not np.asarray(products(recipe, subscripts, 0 * x, w, g, dims, out)[0]).any()
    tiny = products(recipe, subscripts, x * 1e-30, w, g, dims, out)
    assert relative_error(tiny[0], np.einsum(subscripts, x * 1e-30, w)) < 1.5 * FP8_STEP
    assert all(np.isfinite(a).all() for a in products(recipe, subscripts, np.full_like(x, 1e-42), w, g, dims, out))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_what_is_not_finite_comes_out_as_nan(recipe, value):
    subscripts, x, w, dims, out = operands("mlp")
    x[1, 2, 3] = value
    y, _, dw = products(recipe, subscripts, x, w, np.ones((4, 16, 64)), dims, out)
    assert np.isnan(np.asarray(y)[1, 2]).all() and np.isnan(np.asarray(dw)[3]).all()
    g = np.ones((4, 16, 64))
    g[1, 2, 3] = value
    x[1, 2, 3] = 0
    _, dx, dw = products(recipe, subscripts, x, w, g, dims, out)
    assert np.isnan(np.asarray(dx)[1, 2]).all() and np.isnan(np.asarray(dw)[:, 3]).all()


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=NAMES[:2])
@pytest.mark.parametrize("case", list(CASES))
def test_a_mesh_gives_the_same_products(case, recipe):
    """Scales are of the whole tensor or row, wherever its parts are; only the order of sums differs."""
    subscripts, x, w, dims, out = operands(case)
    g = np.random.default_rng(1).normal(size=np.einsum(subscripts, x, w).shape)
    want = products(recipe, subscripts, x, w, g, dims, out)
    mesh = jax.make_mesh((1, 1, 2, 1, 2, 2), ("data", "stage", "fsdp", "expert", "context", "tensor"),
                         axis_types=(AxisType.Explicit,) * 6)
    x_dims = ("batch", "length", "heads", None) if case == "attention out" else ("batch", "stream", None)
    with jax.set_mesh(mesh):
        place = lambda a, layout: jax.device_put(jnp.asarray(a, jnp.float32), NamedSharding(mesh, layout))  # noqa: E731
        placed = (place(x, spec(x_dims, ACTIVATION)), place(w, spec(dims, STORAGE)), place(g, spec(out, ACTIVATION)))
        got = products(recipe, subscripts, *placed, dims, out)
        assert jax.typeof(got[2]).sharding.spec == spec(dims, STORAGE)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, np.asarray(b, np.float64)) < 0.01  # the product is rounded to bfloat16


def test_weights_are_gathered_in_8_bits():
    subscripts, x, w, dims, out = operands("mlp")
    mesh = jax.make_mesh((1, 1, 8, 1, 1, 1), ("data", "stage", "fsdp", "expert", "context", "tensor"),
                         axis_types=(AxisType.Explicit,) * 6)
    with jax.set_mesh(mesh):
        arrays = (jax.ShapeDtypeStruct((8, 16, 32), jnp.float32,
                                       sharding=NamedSharding(mesh, spec(("batch", None, None), ACTIVATION))),
                  jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=NamedSharding(mesh, spec(dims, STORAGE))))
        for name, dtype in (("bf16", "bf16"), ("fp8", "f8_e4m3fn")):
            product = numerics_of(PrecisionConfig(recipe=name)).mlp

            def multiply(x, w, product=product):
                return product.einsum(subscripts, x.astype(jnp.bfloat16), nnx.Param(w, dims=dims), out)

            jaxpr = str(jax.jit(multiply).trace(*arrays).jaxpr)
            assert jaxpr.count("32,64@tensor] = reshard") == jaxpr.count(f":{dtype}[32,64@tensor] = reshard") == 1


@pytest.mark.parametrize("recipe", ["fp8", "fp8_rowwise"])
@pytest.mark.parametrize("platform, careful", [("gpu", 1), ("cpu", 0)])
def test_gradients_of_weights_alone_ask_nvidia_gpus_for_float32_sums(recipe, platform, careful):
    """Of the three products, as cuBLASLt is asked: its fast accumulation cost 0.6% of held-out loss (docs/FP8.md)."""
    product = numerics_of(PrecisionConfig(recipe=recipe), platform).mlp
    subscripts, x, w, dims, out = operands("mlp")

    def loss(x, w):
        return product.einsum(subscripts, x, nnx.Param(w, dims=dims), out).astype(jnp.float32).sum()

    few = jnp.bfloat16(x[:, :8])  # too few tokens for the kernels of numerics/turn.py, which take a GPU to lower
    gradient = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(few, jnp.float32(w))
    text = gradient.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("dot_general") == 3
    assert text.count("precision = [HIGHEST, HIGHEST]") == careful


@pytest.mark.parametrize("name", [f"{recipe}_{chip}_fp8" for recipe in ("llama3_2_1b", "llama3_8b_6layers")
                                  for chip in ("h100", "h200")])
def test_the_measured_steps_held_fp8_calls_alone(name):
    """What `maxlm bench` read off the programs that it timed; a product by another call would be named."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    assert record["slow_products"] == [] == slow_products(record["products"])
    bf16 = {kind: {"__cublas$lt$matmul": {"bf16[1,1]": 1}} for kind in record["products"]}
    assert len(slow_products(bf16)) == 3
