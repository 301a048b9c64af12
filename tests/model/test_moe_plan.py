"""Where tokens stand for their experts: each choice in a row of its expert, the two maps transposes of each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from maxlm.kernels.grouped_matmul import collect, grouped_matmul, spread
from maxlm.kernels.grouped_matmul.blocks import BLOCK
from maxlm.kernels.grouped_matmul.rows import gather_rows, spread_turned
from maxlm.kernels.grouped_matmul.scatter import gather_turned, scatter_tokens
from maxlm.model.moe.plan import by_row, grouped_plan, rows_needed, slotted_plan, unplaced


def choices(N, K, E, skew):
    """Experts of each token, all different; with `skew` all tokens take the same."""
    rng = np.random.default_rng(0)
    rows = [np.arange(K) if skew else rng.permutation(E)[:K] for _ in range(N)]
    return jnp.asarray(np.stack(rows).astype(np.int32))


@pytest.mark.parametrize("skew", [False, True], ids=["random", "all to the same"])
@pytest.mark.parametrize(("N", "K", "E", "multiple", "capacity"), [
    (10, 2, 4, 1, None), (16, 3, 5, 8, None), (1, 1, 6, 4, None), (7, 2, 3, 1, 3), (7, 2, 3, 1, 7)])
def test_a_plan_puts_each_choice_with_its_expert(N, K, E, multiple, capacity, skew):
    expert_NK = choices(N, K, E, skew)
    if capacity is None:
        plan = grouped_plan(expert_NK, E, rows_needed(N * K, E, multiple), multiple)
        assert not unplaced(plan).any()
    else:
        plan = slotted_plan(expert_NK, E, capacity)
        most = np.bincount(np.asarray(expert_NK).ravel(), minlength=E)
        assert unplaced(plan).sum() == np.maximum(most - capacity, 0).sum()
    of_row = np.searchsorted(np.cumsum(plan.sizes_E), np.arange(plan.choice_R.size), side="right")
    held = np.asarray(plan.choice_R) < N * K
    assert (np.asarray(expert_NK).ravel()[np.asarray(plan.choice_R)[held]] == of_row[held]).all()
    assert held.sum() == N * K - unplaced(plan).sum()

    rng = np.random.default_rng(1)
    x_ND = jnp.asarray(rng.normal(size=(N, 6)), jnp.float32)
    g_RD = jnp.asarray(rng.normal(size=(plan.choice_R.size, 6)), jnp.float32)
    placed_N = np.asarray(~unplaced(plan)).sum(axis=1)
    assert np.allclose(collect(spread(x_ND, plan), plan), x_ND * placed_N[:, None], atol=1e-5)
    assert np.isclose(jnp.sum(spread(x_ND, plan) * g_RD), jnp.sum(x_ND * collect(g_RD, plan)), rtol=1e-4)
    assert np.allclose(jax.vjp(lambda x: spread(x, plan), x_ND)[1](g_RD)[0], collect(g_RD, plan))
    weights = jnp.asarray(rng.normal(size=(N, K)), jnp.float32)
    back = jax.vjp(lambda w: by_row(w, plan), weights)[1](g_RD[:, 0])[0]
    assert np.isclose(jnp.sum(by_row(weights, plan) * g_RD[:, 0]), jnp.sum(weights * back), rtol=1e-4)


def test_a_full_buffer_says_who_was_left_out():
    expert_NK = choices(8, 1, 4, skew=True)
    plan = grouped_plan(expert_NK, 4, 5)
    assert unplaced(plan).ravel().tolist() == [False] * 5 + [True] * 3 and plan.sizes_E.tolist() == [5, 0, 0, 0]
    assert (collect(spread(jnp.ones((8, 2)), plan), plan)[5:] == 0).all()


def test_choices_of_other_devices_take_no_rows():
    plan = grouped_plan(jnp.asarray([[-2, 1], [0, 3]], jnp.int32), 2, 4)
    assert plan.sizes_E.tolist() == [1, 1] and unplaced(plan).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("sizes", [[64, 0, 128, 64], [0, 0, 0, 0], [320, 0, 0, 0], [64, 64, 64, 64]], ids=str)
@pytest.mark.parametrize("implementation", ["blocks", "ragged_dot"])
def test_grouped_products_and_gradients(sizes, implementation):
    """Empty groups, one that takes all, and rows behind the last group."""
    rng = np.random.default_rng(0)
    R, D, F = 5 * BLOCK, 8, 12
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((R, D), (len(sizes), D, F)))
    g = jnp.asarray(rng.normal(size=(R, F)), jnp.float32)
    group = np.searchsorted(np.cumsum(sizes), np.arange(R), side="right")
    padded = np.concatenate([w, np.zeros((1, D, F))])
    expected = np.einsum("rd,rdf->rf", x, padded[group])
    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, (w,), jnp.asarray(sizes, jnp.int32), implementation)[0], x, w)
    dx, dw = pull(g)
    behind = group == len(sizes)
    assert np.allclose(np.where(behind[:, None], 0, out), expected, atol=1e-4)
    assert np.allclose(np.where(behind[:, None], 0, dx), np.einsum("rf,rdf->rd", g, padded[group]), atol=1e-4)
    wanted = np.stack([x[group == e].T @ g[group == e] for e in range(len(sizes))])
    assert np.allclose(dw, wanted, atol=1e-3)
    assert not np.allclose(dw, np.roll(wanted, 1, axis=0), atol=1e-3) or sum(sizes) == 0  # the twin


@pytest.mark.parametrize("width", [6, 8])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float32"])
def test_tokens_keep_their_bits(dtype, width):
    """Also where a token is no whole number of words, and where it is not finite."""
    plan = grouped_plan(choices(10, 2, 4, skew=False), 4, 40, 8)
    x_ND = jnp.asarray(np.random.default_rng(0).normal(size=(10, width)), dtype).at[3, 1].set(jnp.nan)
    token_R, held_R = np.asarray(plan.choice_R) // 2, plan.choice_R < 20
    rows = np.concatenate([np.asarray(x_ND), np.zeros((1, width), x_ND.dtype)])[np.minimum(token_R, 10)]
    assert np.asarray(spread(x_ND, plan)).tobytes() == rows.tobytes() and not held_R.all()
    for word in (1, 2, 4):
        got = gather_rows(x_ND, jnp.where(held_R, token_R, 0), held_R, word=word)
        assert np.asarray(got).tobytes() == rows.tobytes()


@pytest.mark.parametrize("rows", [256, 64])
def test_the_kernel_for_nvidia_turns_what_it_gathers(rows):
    plan = grouped_plan(choices(24, 3, 8, skew=False), 8, rows, 8 if rows > 72 else 1)
    x_ND = jnp.asarray(np.random.default_rng(0).normal(size=(24, 64)), jnp.float8_e5m2)
    got, wanted = gather_turned(x_ND, plan.choice_R, 3, interpret=True), spread_turned(x_ND, plan)
    assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()
    assert np.asarray(got).tobytes() == np.ascontiguousarray(np.asarray(spread(x_ND, plan)).T).tobytes()
    twin = gather_turned(x_ND, plan.choice_R[::-1], 3, interpret=True)
    assert np.asarray(twin).tobytes() != np.asarray(wanted).tobytes()


@pytest.mark.parametrize("dtype", ["float8_e5m2", "bfloat16"])
@pytest.mark.parametrize(("N", "K", "experts", "rows"), [(24, 3, 8, 256), (5, 2, 4, 6)])
def test_the_kernel_for_nvidia_writes_what_a_gather_reads(dtype, N, K, experts, rows):
    """Rows that hold nothing and choices without a row included."""
    plan = grouped_plan(choices(N, K, experts, skew=False), experts, rows, 8 if rows > N * K else 1)
    x_ND = jnp.asarray(np.random.default_rng(0).normal(size=(N, 192)), dtype)
    got, wanted = scatter_tokens(x_ND, plan.choice_R, plan.row_NK, interpret=True), spread(x_ND, plan)
    assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()
    twin = scatter_tokens(x_ND, plan.choice_R, plan.row_NK.at[:2].set(plan.row_NK[1::-1]), interpret=True)
    assert np.asarray(twin).tobytes() != np.asarray(wanted).tobytes()


def test_the_kernel_for_nvidia_lowers_for_each_devices_tokens():
    """In a `shard_map` that checks over which axes things vary, with 16-bit and with 8-bit tokens."""
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
    mesh = jax.sharding.AbstractMesh((4,), ("fsdp",), (jax.sharding.AxisType.Explicit,), abstract_device=h100)

    def local(x_ND, expert_NK):
        plan = grouped_plan(expert_NK, 4, 64, 8)
        return tuple(spread(x_ND.astype(dtype), plan) for dtype in (jnp.bfloat16, jnp.float8_e4m3fn))

    with jax.sharding.use_abstract_mesh(mesh):
        split = jax.sharding.NamedSharding(mesh, P("fsdp"))
        x_ND, expert_NK = (jax.ShapeDtypeStruct((64, width), dtype, sharding=split)
                           for width, dtype in ((128, jnp.float32), (2, jnp.int32)))
        spreading = jax.jit(jax.shard_map(local, in_specs=P("fsdp"), out_specs=P("fsdp")))
        text = spreading.trace(x_ND, expert_NK).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
