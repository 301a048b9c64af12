"""The grouped product on TPUs, in bfloat16, float32 or 8-bit floats.

`lax.ragged_dot` is not used there: libtpu 0.0.52 makes its weights' gradient a dense product with every group, and on
v6e and 7x the product itself too (64 groups: 64 times the work; docs/LOG.md). Megablox, which comes with JAX, has the
right form, but takes no 8-bit floats and cannot be called in a `shard_map` that checks what varies; its list of which
tile of rows meets which group is used here.

A tile of rows that several groups share is visited once for each; what a visit may not write is kept. The result is not
written behind the last group, and zeros are put there. A last tile may reach beyond a matrix: what is read there is
anything, what is written there is nothing.

Dims: R rows, E groups, K contracted; D, F produced.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def mosaic_tpu_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, interpret: bool = False) -> jax.Array:
    """`grouped_matmul`; R is a multiple of 128. `interpret=True` runs the kernels' code on a CPU."""
    return tpu_product(x_RD, w_EDF, sizes_E, x_RD.dtype, turned=False, interpret=interpret)


def _backward(interpret, kept, g_RF):
    x_RD, w_EDF, sizes_E = kept
    dx_RD = tpu_product(g_RF, w_EDF, sizes_E, x_RD.dtype, turned=True, interpret=interpret)
    dw_EDF = tpu_weights(x_RD, g_RF, sizes_E, w_EDF.dtype, rows_last=False, interpret=interpret)
    return dx_RD, dw_EDF, None


mosaic_tpu_matmul.defvjp(lambda x, w, sizes, interpret: (mosaic_tpu_matmul(x, w, sizes, interpret), (x, w, sizes)),
                         _backward)


def tpu_product(x_RK: jax.Array, w: jax.Array, sizes_E: jax.Array, dtype: jnp.dtype, *, turned: bool,
                interpret: bool = False) -> jax.Array:
    """[R, F] in `dtype`: each row with its group's matrix of w [E, K, F] (turned: [E, F, K])."""
    (R, K), F, K_of_w = x_RK.shape, w.shape[1 if turned else 2], 1 if turned else 0
    r, k, f = _row_tile(R), _tile(K, x_RK.dtype), _tile(F, x_RK.dtype)
    meets, visits = make_group_metadata(group_sizes=sizes_E, m=R, tm=r, start_group=jnp.int32(0),
                                        num_nonzero_groups=sizes_E.size, visit_empty_groups=False)

    def kernel(start_E, group_v, tile_v, x_rk, w_kf, out_rf, sum_rf):
        visit, step = pl.program_id(1), pl.program_id(2)

        @pl.when(step == 0)
        def _():
            sum_rf[...] = jnp.zeros_like(sum_rf)

        x_part, w_part = x_rk[...], w_kf[...]
        if K % k:
            x_part, w_part = (_only(part, dim, step * k, 0, K) for part, dim in ((x_part, 1), (w_part, K_of_w)))
        sum_rf[...] += jax.lax.dot_general(x_part, w_part, (((1,), (K_of_w,)), ((), ())),
                                           preferred_element_type=jnp.float32)

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            mine = _inside((r, f), 0, tile_v[visit] * r, *_ends(start_E, group_v[visit]))
            out_rf[...] = jnp.where(mine, sum_rf[...], out_rf[...].astype(jnp.float32)).astype(dtype)

    matrix = (pl.BlockSpec((None, f, k), lambda j, v, i, ends, groups, tiles: (groups[v], j, i)) if turned else
              pl.BlockSpec((None, k, f), lambda j, v, i, ends, groups, tiles: (groups[v], i, j)))
    out_RF = _call(
        kernel, meets, (pl.cdiv(F, f), visits, pl.cdiv(K, k)), (x_RK, w), interpret,
        in_specs=[pl.BlockSpec((r, k), lambda j, v, i, ends, groups, tiles: (tiles[v], i)), matrix],
        out_specs=pl.BlockSpec((r, f), lambda j, v, i, ends, groups, tiles: (tiles[v], j)),
        out=(R, F), dtype=dtype, scratch=(r, f), flops=2 * R * K * F)
    return jnp.where((jnp.arange(R) < jnp.sum(sizes_E))[:, None], out_RF, 0)


def tpu_weights(x: jax.Array, g: jax.Array, sizes_E: jax.Array, dtype: jnp.dtype, *, rows_last: bool,
                interpret: bool = False) -> jax.Array:
    """[E, D, F] in `dtype`: the sum over each group's rows of the products of x [R, D] and g [R, F] (rows_last: of
    [D, R] and [F, R])."""
    rows = 1 if rows_last else 0
    R, D, F = x.shape[rows], x.shape[1 - rows], g.shape[1 - rows]
    r, d, f = _row_tile(R), _tile(D, x.dtype), _tile(F, x.dtype)
    meets, visits = make_group_metadata(group_sizes=sizes_E, m=R, tm=r, start_group=jnp.int32(0),
                                        num_nonzero_groups=sizes_E.size, visit_empty_groups=True)

    def kernel(start_E, group_v, tile_v, x_part, g_part, out_df, sum_df):
        visit, visits = pl.program_id(2), pl.num_programs(2)
        group = group_v[visit]

        @pl.when((visit == 0) | (group != group_v[jnp.maximum(visit - 1, 0)]))
        def _():
            sum_df[...] = jnp.zeros_like(sum_df)

        held = (_only(part[...], rows, tile_v[visit] * r, *_ends(start_E, group)) for part in (x_part, g_part))
        sum_df[...] += jax.lax.dot_general(*held, (((rows,), (rows,)), ((), ())), preferred_element_type=jnp.float32)

        @pl.when((visit == visits - 1) | (group != group_v[jnp.minimum(visit + 1, visits - 1)]))
        def _():
            out_df[...] = sum_df[...].astype(dtype)

    def operand(size, dim):  # dim: of the grid
        place = lambda *at: (at[5][at[2]], at[dim])  # noqa: E731 (at[5]: the tile of each visit)
        return pl.BlockSpec((size, r), lambda *at: place(*at)[::-1]) if rows_last else pl.BlockSpec((r, size), place)

    return _call(
        kernel, meets, (pl.cdiv(F, f), pl.cdiv(D, d), visits), (x, g), interpret,
        in_specs=[operand(d, 1), operand(f, 0)],
        out_specs=pl.BlockSpec((None, d, f), lambda j, i, v, ends, groups, tiles: (groups[v], i, j)),
        out=(sizes_E.size, D, F), dtype=dtype, scratch=(d, f), flops=2 * R * D * F)


def _call(kernel, meets, grid, operands, interpret, *, in_specs, out_specs, out, dtype, scratch, flops):
    varying = jax.typeof(operands[0]).manual_axis_type  # over which axes of a mesh the result varies: as the rows do
    moved = sum(a.nbytes for a in operands) + math.prod(out) * dtype.itemsize
    return pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct(out, dtype, manual_axis_type=varying), interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=3, grid=grid, in_specs=in_specs, out_specs=out_specs,
                                               scratch_shapes=[pltpu.VMEM(scratch, jnp.float32)]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
    )(*meets, *operands)


def _ends(start_E, group):
    """The group's first row and the one after its last. start_E: E + 1 numbers."""
    return start_E[group], start_E[group + 1]


def _inside(shape, dim, first, start, stop):
    """Which places along `dim`, counted from `first`, are in [start, stop)."""
    place = jax.lax.broadcasted_iota(jnp.int32, shape, dim) + first
    return (place >= start) & (place < stop)


def _only(part, dim, first, start, stop):
    """Zeros outside."""
    return jnp.where(_inside(part.shape, dim, first, start, stop), part.astype(jnp.float32), 0).astype(part.dtype)


def _row_tile(rows: int) -> int:
    return next(tile for tile in (512, 256, 128) if rows % tile == 0)


def _tile(size: int, dtype: jnp.dtype) -> int:
    """Of a matrix' side: two of each operand and the sums fit into 16 MiB of fast memory."""
    most = 1024 if dtype.itemsize < 4 else 512
    return next((tile for tile in (1024, 512, 256, 128) if tile <= most and size % tile == 0), min(size, 512))
