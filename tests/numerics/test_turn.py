"""The turn of 8-bit values for NVIDIA GPUs: in Pallas' interpreter, on fake devices, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.numerics.turn import (
    round_tiles,
    rounded_and_turned,
    rounded_and_turned_by_parts,
    swap_tiles,
    swapped,
    turned,
    turned_by_parts,
)


def draw(shape, dtype):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def bits(a):
    return np.asarray(a).view(np.uint8)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_tiles_are_swapped(dtype):
    """Of several matrices, and of sizes that tiles of 128 do not divide."""
    x_BMN = draw((2, 96, 160), dtype).at[0, 3, 5].set(jnp.nan)
    got = bits(swap_tiles(x_BMN, interpret=True))
    assert (got == bits(x_BMN).swapaxes(1, 2)).all() and (bits(swapped(x_BMN)) == got).all()
    assert (got != bits(x_BMN[::-1]).swapaxes(1, 2)).any()


def test_tiles_are_rounded_and_swapped():
    """As by XLA, where a number is not finite too."""
    x_MN = draw((96, 160), "bfloat16").at[3, 5].set(jnp.nan).at[4, 5].set(jnp.inf)
    for factor in (jnp.float32(0.0625), jnp.float32(1), jnp.max(x_MN).astype(jnp.float32)):
        got = round_tiles(x_MN, factor.reshape(1, 1), jnp.float8_e5m2, interpret=True)
        wanted = rounded_and_turned(x_MN, factor, jnp.float8_e5m2, 1)
        twin = rounded_and_turned(x_MN, factor * 2, jnp.float8_e5m2, 1)
        same = [[np.array_equal(*(np.asarray(values, np.float32) for values in pair), equal_nan=True)
                 for pair in zip(got, other, strict=True)] for other in (wanted, twin)]
        assert same[0] == [True, True] and (np.isnan(factor) or same[1] == [False, False])


def test_each_device_turns_its_part():
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Explicit,) * 3)
    x = draw((4, 6, 4, 8), "float8_e5m2")
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P(("a", "b"), None, "c", None)))
        by_parts, whole = (jax.jit(turn, static_argnums=1)(placed, 2) for turn in (turned_by_parts, turned))
        assert jax.typeof(by_parts).sharding == jax.typeof(whole).sharding
        at_once, apart = (jax.jit(f, static_argnums=(2, 3))(placed, jnp.float32(0.5).reshape(1, 1, 1, 1),
                                                            jnp.float8_e5m2, 2)
                          for f in (rounded_and_turned_by_parts, rounded_and_turned))
        assert [a.sharding for a in at_once] == [a.sharding for a in apart]
        assert all((bits(a) == bits(b)).all() for a, b in zip(at_once, apart, strict=True))
    assert by_parts.sharding.spec == P("c", None, ("a", "b"), None)
    assert (bits(by_parts) == bits(x).transpose(2, 3, 0, 1)).all() and (bits(whole) == bits(by_parts)).all()


def test_the_kernel_lowers_for_each_devices_part():
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
    mesh = jax.sharding.AbstractMesh((4,), ("fsdp",), (AxisType.Explicit,), abstract_device=h100)
    with jax.sharding.use_abstract_mesh(mesh):
        x = jax.ShapeDtypeStruct((8, 64, 2, 96), jnp.float8_e4m3fn, sharding=NamedSharding(mesh, P("fsdp")))
        text = jax.jit(turned, static_argnums=1).trace(x, 2).lower(lowering_platforms=("cuda",)).as_text()
        wide = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding)
        factor = jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32)
        both = jax.jit(rounded_and_turned, static_argnums=(2, 3)).trace(wide, factor, jnp.float8_e5m2, 2)
        both = both.lower(lowering_platforms=("cuda",)).as_text()
    assert "-> (tensor<128x192xf8E5M2>, tensor<192x128xf8E5M2>)" in both and both.count("xla.gpu.triton") == 1
    assert "tensor<1x128x192xui8>) -> tensor<1x192x128xui8>" in text and text.count("xla.gpu.triton") == 1
