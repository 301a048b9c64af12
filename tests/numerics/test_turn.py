"""The turn of 8-bit values for NVIDIA GPUs: in Pallas' interpreter, on fake devices, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.numerics.turn import swap_tiles, swapped, turned, turned_by_parts


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


def test_each_device_turns_its_part():
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Explicit,) * 3)
    x = draw((4, 6, 4, 8), "float8_e5m2")
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P(("a", "b"), None, "c", None)))
        by_parts, whole = (jax.jit(turn, static_argnums=1)(placed, 2) for turn in (turned_by_parts, turned))
        assert jax.typeof(by_parts).sharding == jax.typeof(whole).sharding
    assert by_parts.sharding.spec == P("c", None, ("a", "b"), None)
    assert (bits(by_parts) == bits(x).transpose(2, 3, 0, 1)).all() and (bits(whole) == bits(by_parts)).all()


def test_the_kernel_lowers_for_each_devices_part():
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
    mesh = jax.sharding.AbstractMesh((4,), ("fsdp",), (AxisType.Explicit,), abstract_device=h100)
    with jax.sharding.use_abstract_mesh(mesh):
        x = jax.ShapeDtypeStruct((8, 64, 2, 96), jnp.float8_e4m3fn, sharding=NamedSharding(mesh, P("fsdp")))
        text = jax.jit(turned, static_argnums=1).trace(x, 2).lower(lowering_platforms=("cuda",)).as_text()
    assert "tensor<1x128x192xf8E4M3FN>) -> tensor<1x192x128xf8E4M3FN>" in text and text.count("xla.gpu.triton") == 1
