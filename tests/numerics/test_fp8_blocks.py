"""Products of 8-bit blocks against float64, and on what a block must keep to itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from maxlm.config import ModelConfig, PrecisionConfig, RunConfig
from maxlm.numerics import Fp8, Fp8Blocks, Plain, numerics_of
from maxlm.numerics.blocked import dequantised, quantise
from maxlm.numerics.blocks import block_along, cut, joined
from maxlm.parallel.sharding import ACTIVATION, STORAGE, spec
from maxlm.schema import ConfigError
from tests.numerics.test_fp8_products import CASES, FP8_STEP, exact, operands, products, relative_error

BLOCKS = Fp8Blocks(jnp.dtype("float32"))
WIDE = ("BTD,DF->BTF", (2, 150, 300), (300, 200), ("embed", "mlp"), ("batch", None, "mlp"))  # none a multiple of 128
LARGEST = 448.0


def wide(seed=0):
    subscripts, x_shape, w_shape, dims, out = WIDE
    rng = np.random.default_rng(seed)
    return subscripts, rng.normal(size=x_shape), rng.normal(size=w_shape) / 8, dims, out


def in_numpy(x, *blocks):
    """x as its blocks (dim -> size) hold it, from the definition: nearest E4M3 of x over a power of two."""
    result = np.empty_like(x)
    starts = [range(0, n, blocks[i] if i < len(blocks) and blocks[i] else n) for i, n in enumerate(x.shape)]
    for corner in np.ndindex(*map(len, starts)):
        part = tuple(slice(s[c], s[c] + (blocks[i] if i < len(blocks) and blocks[i] else n))
                     for i, (s, c, n) in enumerate(zip(starts, corner, x.shape, strict=True)))
        largest = np.abs(x[part]).max()
        scale = 2.0 ** np.floor(np.log2(LARGEST / largest)) if largest else 1.0
        held = jnp.asarray(x[part] * scale, jnp.float32).astype(jnp.float8_e4m3fn)
        result[part] = np.asarray(held, np.float64) / scale
    return result


def test_cutting_has_a_way_back():
    x = jnp.arange(2 * 300 * 3.0).reshape(2, 300, 3)
    for dim in (-1, -2, -3):
        block = block_along(dim, x.shape[dim], False)
        assert block.size <= 128 and (joined(cut(x, block), block, x.shape[dim]) == x).all()
    assert block_along(-1, 300, False)[1:] == (128, 3) and block_along(-1, 8192, True)[1:] == (128, 64)
    assert block_along(-1, 64, True)[1:] == (8, 8), "eight devices can share it"


@pytest.mark.parametrize("case", [*CASES, "wide"])
def test_product_and_gradients_are_within_the_formats_rounding(case):
    subscripts, x, w, dims, out = wide() if case == "wide" else operands(case)
    g = np.random.default_rng(1).normal(size=np.einsum(subscripts, x, w).shape)
    for got, want in zip(products(BLOCKS, subscripts, x, w, g, dims, out), exact(subscripts, x, w, g), strict=True):
        assert got.dtype == jnp.float32 and got.shape == want.shape
        assert 0.1 * FP8_STEP < relative_error(got, want) < FP8_STEP


def test_it_is_the_product_of_the_blocks_as_defined():
    """To the rounding of float32 sums; with a weight that was not quantised it is not."""
    subscripts, x, w, dims, out = wide()
    x *= np.exp(2 * np.random.default_rng(2).normal(size=x.shape))
    g = np.random.default_rng(1).normal(size=(2, 150, 200))
    y, dx, dw = products(BLOCKS, subscripts, x, w, g, dims, out)
    # 200 is no multiple of 32, so `tensor` cannot split it and its blocks are 128 and 72
    w8 = np.concatenate([in_numpy(w[:, :128], 128, 128), in_numpy(w[:, 128:], 128, 128)], axis=1)
    assert relative_error(y, np.einsum(subscripts, in_numpy(x, 1, 1, 128), w8)) < 1e-5
    assert relative_error(dx, np.einsum("BTF,DF->BTD", in_numpy(g, 1, 1, 128), w8)) < 1e-5
    tokens = [np.stack([np.concatenate([in_numpy(row[:128].T, 1, 128).T, in_numpy(row[128:].T, 1, 128).T])
                        for row in a]) for a in (x, g)]
    assert relative_error(dw, np.einsum("BTD,BTF->DF", *tokens)) < 1e-5
    assert relative_error(y, np.einsum(subscripts, in_numpy(x, 1, 1, 128), w)) > 1e-3


def test_an_outlier_costs_its_own_block_alone():
    subscripts, x, w, dims, out = wide()
    x *= 0.01
    x[0, 0, 0] = 1e4
    w[:128] = 0  # what the outlier's block multiplies: the rest is exact but for its own rounding
    g = np.ones((2, 150, 200))
    rows = Fp8(jnp.dtype("float32"), "row")
    want = np.einsum(subscripts, x, w)
    ours, theirs = (products(r, subscripts, x, w, g, dims, out)[0] for r in (BLOCKS, rows))
    assert relative_error(ours[0, 0], want[0, 0]) < 1.5 * FP8_STEP
    assert relative_error(theirs[0, 0], want[0, 0]) > 0.2


def test_zeros_and_the_smallest_numbers_stay_finite():
    subscripts, x, w, dims, out = wide()
    g = np.ones((2, 150, 200))
    for got in products(BLOCKS, subscripts, 0 * x, w, 0 * g, dims, out):
        assert not np.asarray(got).any()
    tiny = products(BLOCKS, subscripts, x * 1e-30, w, g, dims, out)
    assert relative_error(tiny[0], np.einsum(subscripts, x * 1e-30, w)) < 1.5 * FP8_STEP
    assert all(np.isfinite(a).all() for a in products(BLOCKS, subscripts, np.full_like(x, 1e-42), w, g, dims, out))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_comes_out_as_nan(value):
    subscripts, x, w, dims, out = wide()
    g = np.ones((2, 150, 200))
    x[1, 2, 3] = value
    y, _, dw = products(BLOCKS, subscripts, x, w, g, dims, out)
    assert np.isnan(np.asarray(y)[1, 2]).all() and np.isnan(np.asarray(dw)[3]).all()
    assert np.isfinite(np.asarray(y)[0]).all()
    x[1, 2, 3], g[1, 2, 3] = 0, value
    _, dx, dw = products(BLOCKS, subscripts, x, w, g, dims, out)
    assert np.isnan(np.asarray(dx)[1, 2]).all() and np.isnan(np.asarray(dw)[:, 3]).all()
    g[1, 2, 3], w[5, 6] = 0, value
    y, dx, _ = products(BLOCKS, subscripts, x, w, g, dims, out)
    assert np.isnan(np.asarray(y)[..., 6]).all() and np.isnan(np.asarray(dx)[..., 5]).all()


def test_what_a_block_holds_is_exact_in_bfloat16():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 300)), jnp.float32)
    block = block_along(-1, 300, False)
    held = dequantised(quantise(x, block), jnp.float32, block)
    assert (held == held.astype(jnp.bfloat16)).all() and not (held == x).all()
    again = dequantised(quantise(held, block), jnp.float32, block)
    assert (again == held).all()


@pytest.mark.parametrize("case", list(CASES))
def test_a_mesh_gives_the_same_products(case):
    """Blocks of what FSDP splits are those of the whole; only the order of sums differs."""
    subscripts, x, w, dims, out = operands(case)
    g = np.random.default_rng(1).normal(size=np.einsum(subscripts, x, w).shape)
    want = products(BLOCKS, subscripts, x, w, g, dims, out)
    mesh = jax.make_mesh((2, 1, 2, 1, 1, 2), ("data", "stage", "fsdp", "expert", "context", "tensor"),
                         axis_types=(AxisType.Explicit,) * 6)
    x_dims = ("batch", None, "heads", None) if case == "attention out" else ("batch", None, None)
    with jax.set_mesh(mesh):
        place = lambda a, layout: jax.device_put(jnp.asarray(a, jnp.float32), NamedSharding(mesh, layout))  # noqa: E731
        placed = (place(x, spec(x_dims, ACTIVATION)), place(w, spec(dims, STORAGE)), place(g, spec(out, ACTIVATION)))
        got = products(BLOCKS, subscripts, *placed, dims, out)
        assert jax.typeof(got[2]).sharding.spec == spec(dims, STORAGE)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, np.asarray(b, np.float64)) < 1e-5


def test_weights_are_gathered_in_8_bits_and_a_split_block_is_refused():
    subscripts, x, w, dims, out = operands("mlp")
    for axis, size in (("fsdp", 2), ("tensor", 3)):
        shape = dict.fromkeys(("data", "stage", "fsdp", "expert", "context", "tensor"), 1)
        devices = 8 if axis == "fsdp" else 6
        shape |= {axis: size, "data": devices // size}
        mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), devices=jax.devices()[:devices],
                             axis_types=(AxisType.Explicit,) * 6)
        with jax.set_mesh(mesh):
            arrays = (jax.ShapeDtypeStruct((8, 16, 32), jnp.bfloat16,
                                           sharding=NamedSharding(mesh, spec(("batch", None, None), ACTIVATION))),
                      jax.ShapeDtypeStruct((32, 66 if axis == "tensor" else 64), jnp.float32,
                                           sharding=NamedSharding(mesh, spec(dims, STORAGE))))

            def multiply(x, w):
                return Fp8Blocks(jnp.dtype("bfloat16")).einsum(subscripts, x, nnx.Param(w, dims=dims), out)

            if axis == "tensor":
                with pytest.raises(ConfigError, match="mesh.tensor=3 devices cannot share"):
                    jax.jit(multiply).trace(*arrays)
            else:
                jaxpr = str(jax.jit(multiply).trace(*arrays).jaxpr)
                assert jaxpr.count(":f8_e4m3fn[32,64@tensor] = reshard") == 1
                assert jaxpr.count("f32[32,64@tensor] = reshard") + jaxpr.count("bf16[32,64@tensor] = reshard") <= 1


def test_experts_are_refused_before_anything_runs():
    sparse = ModelConfig(num_experts=4, experts_per_token=2, expert_dim=64)
    with pytest.raises(ConfigError, match="no products of experts: set precision.fp8_sites=attention,mlp"):
        RunConfig(model=sparse, precision=PrecisionConfig(recipe="fp8_block"))
    precision = PrecisionConfig(recipe="fp8_block", fp8_sites=("attention", "mlp"))
    RunConfig(model=sparse, precision=precision)
    numerics = numerics_of(precision)
    assert isinstance(numerics.mlp, Fp8Blocks) and isinstance(numerics.experts, Plain)
