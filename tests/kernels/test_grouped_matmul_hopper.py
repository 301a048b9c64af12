"""The Hopper kernels without a GPU: their results in Pallas' interpreter, and that they lower for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from maxlm.kernels.grouped_matmul import grouped_matmul, grouped_swiglu, hopper, persistent
from maxlm.kernels.grouped_matmul.gated import gated_gradients

E, ROWS, WIDTH, HIDDEN = 3, 512, 128, 256
UNEVEN, ONE_TAKES_ALL, NONE = (128, 0, 256), (0, 384, 0), (0, 0, 0)
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2

newer = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="this JAX's interpreter has no products")


@pytest.fixture
def races(monkeypatch):
    """Pallas' interpreter, and what it says of races between warpgroups and copies: a state a kernel. It takes a
    warpgroup for one thread, so a race inside of one it cannot see."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # JAX tells it nowhere else

    made, states = gpu_callbacks.GPURaceDetectionState, []
    monkeypatch.setattr(gpu_callbacks, "GPURaceDetectionState", lambda **kw: states.append(made(**kw)) or states[-1])
    monkeypatch.setattr(persistent, "MULTIPROCESSORS", 2)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield states


@pytest.fixture
def interpreted(races):
    yield
    assert races and not any(state.races_found for state in races)


def draw(seed, shape, dtype):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def exact(a):
    return np.asarray(a.astype(jnp.float32), np.float64)


def product_of(a_RK, b_EKN, sizes):
    out, at = np.zeros((a_RK.shape[0], b_EKN.shape[2])), 0
    for group, size in enumerate(sizes):
        out[at : at + size] = a_RK[at : at + size] @ b_EKN[group]
        at += size
    return out


def weights_of(a_RM, b_RN, sizes):
    ends = np.cumsum(sizes)
    return np.stack([a_RM[end - size : end].T @ b_RN[end - size : end] for end, size in zip(ends, sizes, strict=True)])


def relative(got, wanted):
    return np.linalg.norm(exact(got) - exact(wanted)) / np.linalg.norm(exact(wanted))


def near(got, wanted):
    return np.abs(exact(got) - wanted).max() <= 0.004 * np.abs(wanted).max()


@newer
@pytest.mark.parametrize("sizes", [UNEVEN, pytest.param(ONE_TAKES_ALL, marks=pytest.mark.slow),
                                   pytest.param(NONE, marks=pytest.mark.slow)])
def test_product_and_gradients_of_bfloat16(interpreted, sizes):
    """Rows behind the last group hold NaN, and give 0."""
    x, g = draw(0, (ROWS, WIDTH), jnp.bfloat16), draw(1, (ROWS, HIDDEN), jnp.bfloat16)
    weights = tuple(draw(seed, (E, WIDTH, HIDDEN), jnp.bfloat16) for seed in (2, 3))
    held = (jnp.arange(ROWS) < sum(sizes))[:, None]
    x = jnp.where(held, x, jnp.nan)
    outs, pull = jax.vjp(lambda x, *ws: grouped_matmul(x, ws, jnp.asarray(sizes, jnp.int32), "mosaic_gpu"), x, *weights)
    dx, *dws = pull((jnp.where(held, g, jnp.nan), jnp.where(held, g / 2, jnp.nan)))
    x64, g64 = (np.nan_to_num(exact(jnp.where(held, a, 0))) for a in (x, g))
    wanted = sum(product_of(share * g64, exact(w).transpose(0, 2, 1), sizes)
                 for share, w in zip((1, 0.5), weights, strict=True))
    assert all(near(out, product_of(x64, exact(w), sizes)) for out, w in zip(outs, weights, strict=True))
    assert near(dx, wanted)
    assert near(dws[0], weights_of(x64, g64, sizes)) and near(dws[1], weights_of(x64, g64 / 2, sizes))
    if sizes == UNEVEN:  # a row that counts for the next group is found
        assert not near(dx, product_of(1.5 * g64, exact(weights[0]).transpose(0, 2, 1), (256, 0, 128)))


@newer
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3)])
def test_products_of_8_bits(interpreted, formats):
    a, b = draw(0, (ROWS, WIDTH), formats[0]), draw(1, (E, HIDDEN, WIDTH), formats[1])
    out = hopper.grouped_product(((a, b),), jnp.asarray(UNEVEN, jnp.int32), b_last=True)
    assert near(out, product_of(exact(a), exact(b).transpose(0, 2, 1), UNEVEN))
    assert not near(out, product_of(exact(a), exact(b).transpose(0, 2, 1), (0, 128, 256)))
    x, g = draw(2, (WIDTH, ROWS), formats[1]), draw(3, (HIDDEN, ROWS), formats[0])
    dw = hopper.grouped_weights(x, g, jnp.asarray(UNEVEN, jnp.int32), rows_last=True)
    assert near(dw, weights_of(exact(x).T, exact(g).T, UNEVEN))


@newer
def test_sums_in_parts_of_8_bits(interpreted):
    """Promoted to float32 after each piece, or two, of what is summed over; also where there is none."""
    a, b = draw(0, (ROWS, 3 * WIDTH), E4M3), draw(1, (E, 128, 3 * WIDTH), E4M3)
    x, g = draw(2, (WIDTH, ROWS), E4M3), draw(3, (WIDTH, ROWS), E5M2)
    sizes = jnp.asarray(UNEVEN, jnp.int32)
    for promoted, halved in ((1, "columns"), (2, "rows")):
        tiles = persistent.Tiles(128, 128, halved, 3, promoted=promoted)
        out = hopper.grouped_product(((a, b),), sizes, b_last=True, tiles=tiles)
        dw = hopper.grouped_weights(x, g, sizes, rows_last=True, tiles=tiles)
        assert near(out, product_of(exact(a), exact(b).transpose(0, 2, 1), UNEVEN))
        assert near(dw, weights_of(exact(x).T, exact(g).T, UNEVEN))
    assert not near(out, product_of(exact(a), exact(b).transpose(0, 2, 1), (0, 128, 256)))


@newer
@pytest.mark.parametrize("hidden", [128, 512])
def test_swiglu_and_its_gradients(interpreted, hidden):
    """As what it is made of says, in float32; also for pairs of multiprocessors (512). Rows behind the last group hold
    NaN, and give 0."""
    sizes = jnp.asarray(UNEVEN, jnp.int32)
    held = (jnp.arange(ROWS) < sum(UNEVEN))[:, None]
    x, g = (draw(seed, (ROWS, WIDTH), jnp.bfloat16) for seed in (0, 1))
    gate, up = (draw(seed, (E, WIDTH, hidden), jnp.bfloat16) / 16 for seed in (2, 3))
    down, weight_R = draw(4, (E, hidden, WIDTH), jnp.bfloat16), jax.random.uniform(jax.random.key(5), (ROWS,))

    def apart(x, weights, weight_R, activate=jax.nn.silu):
        gate_RF, up_RF = (jax.lax.ragged_dot(x, w, sizes) for w in weights[:2])
        return jax.lax.ragged_dot(activate(gate_RF) * up_RF * weight_R[:, None], weights[2], sizes)

    def both(function, dtype, behind):
        cast = functools.partial(jax.tree.map, lambda a: a.astype(dtype))
        x_behind, g_behind = (jnp.where(held, a, behind) for a in (x, g))
        out, pull = jax.vjp(function, cast(x_behind), cast((gate, up, down)), weight_R)
        return jax.tree.leaves((out, pull(cast(g_behind))))

    got = both(lambda x, weights, weight_R: grouped_swiglu(x, weights, weight_R, sizes, "mosaic_gpu"), jnp.bfloat16,
               jnp.nan)
    for a, b in zip(got, both(apart, jnp.float32, 0), strict=True):
        assert relative(a, b) < 0.01
    for a, b in zip(got, both(functools.partial(apart, activate=jax.nn.gelu), jnp.float32, 0), strict=True):
        assert relative(a, b) > 0.01


@newer
def test_a_race_is_found(monkeypatch, races):
    """The twin of what `interpreted` asserts: a stage is given back before it is read; in one kernel, not the last."""
    def given_back_early(ring, first, rows, index):
        stage = ring.stage(first + index)
        plgpu.barrier_wait(ring.full.at[stage])
        plgpu.barrier_arrive(ring.empty.at[stage])
        return ring.a[stage, rows, slice(None)], ring.b[stage, 0, rows, slice(None)]

    monkeypatch.setattr(persistent, "_beside", given_back_early)
    units, g = [draw(seed, (ROWS, HIDDEN), jnp.bfloat16) for seed in (0, 1)], draw(2, (ROWS, WIDTH), jnp.bfloat16)
    down, sizes = draw(3, (E, HIDDEN, WIDTH), jnp.bfloat16), jnp.asarray(UNEVEN, jnp.int32)
    jax.block_until_ready(gated_gradients(g, down, sizes, *units, jnp.ones(ROWS)))
    jax.block_until_ready(hopper.grouped_weights(units[0], g, sizes, rows_last=False))
    assert [state.races_found for state in races] == [True, False]


def test_threads_meet_before_a_stage_is_given_back():
    """What stands between the loads of units and the barrier, in the one kernel that loads from stages: without it a
    thread gave back what others were reading. Twelve squares are stored behind a fence as well."""
    shape = jax.ShapeDtypeStruct
    rows, weights = shape((ROWS, HIDDEN), jnp.bfloat16), shape((ROWS,), jnp.float32)
    traced = str(jax.make_jaxpr(gated_gradients)(
        shape((ROWS, WIDTH), jnp.bfloat16), shape((E, HIDDEN, WIDTH), jnp.bfloat16), shape((E,), jnp.int32), rows, rows,
        weights))
    pairs, stores = HIDDEN // persistent.SQUARE, 3 * HIDDEN // persistent.SQUARE
    assert traced.count("commit_smem") == pairs + stores


def test_swiglu_on_devices_that_hold_other_rows():
    """In a `shard_map`, whose types say what differs between devices: gradients of what all have are sums over them."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    rows, whole = jax.P("data"), jax.P()
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    weights = (*[shape((E, WIDTH, HIDDEN))] * 2, shape((E, HIDDEN, WIDTH)))

    def local(x, weights, weight_R, sizes):
        apart = jax.tree.map(lambda w: jax.lax.pcast(w, "data", to="varying"), weights)
        return grouped_swiglu(x, apart, weight_R, sizes, "mosaic_gpu")

    def loss(x, weights, weight_R, sizes):
        out = jax.shard_map(local, in_specs=(rows, whole, rows, rows), out_specs=rows)(x, weights, weight_R, sizes)
        return jnp.sum(out.astype(jnp.float32))

    with jax.set_mesh(mesh):
        place = lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec))  # noqa: E731
        operands = (place(shape((2 * ROWS, WIDTH)), rows), jax.tree.map(lambda w: place(w, whole), weights),
                    place(jax.ShapeDtypeStruct((2 * ROWS,), jnp.float32), rows),
                    place(jax.ShapeDtypeStruct((2 * E,), jnp.int32), rows))
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*operands)
    assert [a.shape for a in jax.tree.leaves(traced.out_info)] == [a.shape for a in jax.tree.leaves(operands[:3])]
    assert str(traced.jaxpr).count("psum") >= 3  # of the three weights' gradients


@pytest.mark.parametrize("hidden", [256, 384])
def test_kernels_lower_for_cuda(hidden):
    shape = jax.ShapeDtypeStruct
    x, w = shape((ROWS, WIDTH), jnp.bfloat16), shape((E, WIDTH, hidden), jnp.bfloat16)

    def gradient(x, w, sizes):
        return jax.vjp(lambda x, w: grouped_matmul(x, (w,), sizes, "mosaic_gpu")[0], x, w)[1](jnp.ones((ROWS, hidden)
                                                                                                       , x.dtype))

    def eight_bit(x, w, sizes):
        return hopper.grouped_product(((x, w),), sizes, b_last=True)

    def swiglu(x, w, sizes):
        weights, weight_R = (w, w, w.swapaxes(1, 2)), jnp.ones(ROWS)
        return jax.grad(lambda x, weights: jnp.sum(grouped_swiglu(x, weights, weight_R, sizes, "mosaic_gpu")),
                        (0, 1))(x, weights)

    w8 = shape((E, hidden, WIDTH), E4M3)
    for function, *operands in ((gradient, x, w), (swiglu, x, w), (eight_bit, shape(x.shape, E4M3), w8)):
        lowered = jax.jit(function).trace(*operands, shape((E,), jnp.int32)).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()
