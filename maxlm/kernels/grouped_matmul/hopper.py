"""Grouped products on Hopper GPUs: persistent kernels of three warpgroups, in Pallas-Mosaic.

One warpgroup of a multiprocessor copies tiles of the operands into shared memory, round a ring of stages, and runs
ahead into the next tile of the result while the other two multiply and store. Each group's rows are a multiple of ROWS,
so that no tile of the result, and no step of a weight's gradient, holds rows of two groups: nothing is masked.

Operands are bfloat16 (or float16), or of 8 bits; accumulation is float32 in the tensor cores' own precision, and for
8-bit gradients of weights in registers (`Tiles.promoted`). The units
take operands of 8 bits only with what is summed over in the last dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 128  # every group's rows are a multiple of this
MULTIPROCESSORS = 132  # of an H100 or H200; with fewer, two programs share one
LOADER, LOADER_REGISTERS, MULTIPLIER_REGISTERS = 2, 40, 232  # of 512 a thread of each of four warps
PIECE = 64  # rows and columns of the result that leave through shared memory at a time


@dataclass(frozen=True)
class Tiles:
    """A multiprocessor's piece of the result, rows x columns, which two warpgroups halve along `halved`; and how many
    pieces of `depth` bytes of what is summed over are under way.

    promoted: pieces after which a sum in the tensor cores, short of float32 for 8-bit operands (arXiv:2412.19437,
    section 3.5.2), is added to one in registers, which then hold both; 0: never.
    """

    rows: int
    columns: int
    halved: Literal["rows", "columns"]
    stages: int
    depth: int = 128
    promoted: int = 0

    @property
    def half(self) -> tuple[int, int]:
        if self.halved == "rows":
            return self.rows // 2, self.columns
        return self.rows, self.columns // 2


def _product_tiles(columns: int) -> Tiles:
    """What ran fastest on an H100 of rows and columns halved, and 128 or 256 columns (docs/MOE.md)."""
    return Tiles(ROWS, 256, "columns", 4) if columns % 256 == 0 else Tiles(ROWS, 128, "columns", 6)


def _weights_tiles(columns: int, eight_bit: bool) -> Tiles:
    """8-bit sums over all rows of a group are promoted, as those of dense layers are (numerics/fp8.py): of numbers of
    one sign they were 6 to 12% off, and are 0.2% so, at 1,156 instead of 1,531 TFLOP/s."""
    if eight_bit:
        return Tiles(128, 128, "columns", 4, promoted=1)
    return Tiles(128, 256, "rows", 4) if columns % 256 == 0 else Tiles(128, 128, "columns", 6)


class _Copy(NamedTuple):
    """`steps` steps of a sum, and the slices of the operands at each."""

    steps: Any
    left: Callable[[Any], Any]
    right: Callable[[Any], Any]


class _Work(NamedTuple):
    """A piece of the result: the sums that it is made of, one after the other, what it is multiplied with (a function,
    because one warpgroup does not need it), and where it goes."""

    sums: tuple[_Copy, ...]
    scale: Callable[[], Any] | None
    out: Any

    @property
    def steps(self) -> Any:
        return sum(part.steps for part in self.sums)


def grouped_product(pairs: Sequence[tuple[jax.Array, jax.Array]], sizes_E: jax.Array,
                    scale_E: jax.Array | None = None, *, b_last: bool, tiles: Tiles | None = None) -> jax.Array:
    """[R, N]: the sum over pairs (a, b) of the rows of a, each times its group's matrix of b, times the group's scale;
    0 behind the last group, whatever a holds there. a: [R, K]; b: [E, K, N], or where `b_last` [E, N, K]. In bfloat16
    where they have 8 bits.

    sizes_E: int32, multiples of ROWS. K: a multiple of 128 bytes, N: of 128.
    """
    R, E = pairs[0][0].shape[0], sizes_E.size
    N = pairs[0][1].shape[1 if b_last else 2]
    tiles = tiles or _product_tiles(N)
    depth = tiles.depth // pairs[0][0].dtype.itemsize
    assert tiles.rows == ROWS and R % ROWS == 0 and N % tiles.columns == 0, (R, N, tiles)
    assert all(a.shape[1] % depth == 0 and b.shape[0] == E for a, b in pairs), [a.shape for a, _ in pairs]
    across = N // tiles.columns
    end_E = jnp.cumsum(sizes_E) // ROWS
    group_t = jnp.sum(jnp.arange(R // ROWS)[:, None] >= end_E[None], axis=1, dtype=jnp.int32)  # E: behind the last

    scales = () if scale_E is None else (jnp.append(scale_E.astype(jnp.float32), 0.0),)

    def body(group_gmem, *refs):
        (*scale_gmem,), refs = refs[: len(scales)], refs[len(scales) :]
        operands, (out_gmem, *scratch) = refs[: 2 * len(pairs)], refs[2 * len(pairs) :]

        def work(t: Any) -> _Work:
            down = lax.div(t, across)
            group = group_gmem[down]
            rows = pl.ds(down * ROWS, ROWS)
            columns = pl.ds(lax.rem(t, across) * tiles.columns, tiles.columns)

            def one(a_gmem, b_gmem):
                summed = lambda k: pl.ds(k * depth, depth)  # noqa: E731
                b_tile = (lambda k: (columns, summed(k))) if b_last else (lambda k: (summed(k), columns))
                steps = lax.select(group < E, a_gmem.shape[1] // depth, 0)
                return _Copy(steps, lambda k: a_gmem.at[rows, summed(k)], lambda k: b_gmem.at[(group, *b_tile(k))])

            scale = (lambda: scale_gmem[0][group]) if scales else None
            return _Work(tuple(map(one, operands[::2], operands[1::2])), scale, out_gmem.at[rows, columns])

        _run(tiles, R // ROWS * across, work, False, b_last, *scratch)

    b_shape = (tiles.columns, depth) if b_last else (depth, tiles.columns)
    a_dtype, b_dtype = (array.dtype for array in pairs[0])
    kernel = _kernel(body, tiles, (R, N), ((ROWS, depth), a_dtype), (b_shape, b_dtype))
    return _varying(kernel(group_t, *scales, *(array for pair in pairs for array in pair)), sizes_E, pairs[0][1])


def grouped_weights(a: jax.Array, b: jax.Array, sizes_E: jax.Array, scale: jax.Array | None = None, *,
                    rows_last: bool, tiles: Tiles | None = None) -> jax.Array:
    """[E, M, N]: of each group the sum over its rows of a's row times b's, times `scale`, a scalar. a: [R, M],
    b: [R, N], or where `rows_last` [M, R] and [N, R]. An empty group's are zeros. In bfloat16 where they have 8 bits.

    sizes_E: as above. M and N: multiples of 128.
    """
    turn = (lambda shape: shape[::-1]) if rows_last else (lambda shape: shape)
    (R, M), (_, N), E = turn(a.shape), turn(b.shape), sizes_E.size
    tiles = tiles or _weights_tiles(N, a.dtype.itemsize == 1)
    depth = tiles.depth // a.dtype.itemsize
    assert ROWS % depth == 0 and M % tiles.rows == 0 and N % tiles.columns == 0, (R, M, N, tiles)
    down, across = M // tiles.rows, N // tiles.columns
    first_E = jnp.cumsum(sizes_E) - sizes_E

    scales = () if scale is None else (scale.astype(jnp.float32).reshape(1),)

    def body(first_gmem, steps_gmem, *refs):
        (*scale_gmem,), (a_gmem, b_gmem, out_gmem, *scratch) = refs[: len(scales)], refs[len(scales) :]

        def work(t: Any) -> _Work:
            group, piece = lax.div(t, down * across), lax.rem(t, down * across)
            rows = pl.ds(lax.div(piece, across) * tiles.rows, tiles.rows)
            columns = pl.ds(lax.rem(piece, across) * tiles.columns, tiles.columns)
            summed = lambda k: pl.ds(pl.multiple_of(first_gmem[group], ROWS) + k * depth, depth)  # noqa: E731
            copy = _Copy(steps_gmem[group], lambda k: a_gmem.at[turn((summed(k), rows))],
                         lambda k: b_gmem.at[turn((summed(k), columns))])
            times = (lambda: scale_gmem[0][0]) if scales else None
            return _Work((copy,), times, out_gmem.at[group, rows, columns])

        _run(tiles, E * down * across, work, not rows_last, rows_last, *scratch)

    shapes = ((turn((depth, tiles.rows)), a.dtype), (turn((depth, tiles.columns)), b.dtype))
    kernel = _kernel(body, tiles, (E, M, N), *shapes)
    out = kernel(first_E.astype(jnp.int32), (sizes_E // depth).astype(jnp.int32), *scales, a, b)
    return _varying(out, sizes_E, a)


def _kernel(body: Callable, tiles: Tiles, shape: tuple[int, ...], a: tuple, b: tuple) -> Callable:
    """`body(*inputs, output, *scratch)` as a program for every multiprocessor. a, b: shape and dtype of the operands'
    tiles."""
    dtype = jnp.dtype(a[1]) if jnp.dtype(a[1]).itemsize == 2 else jnp.dtype("bfloat16")
    ring = lambda shape, dtype: _shared((tiles.stages, *shape), dtype)  # noqa: E731
    barriers = lambda: plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages)  # noqa: E731
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        scratch_types=(ring(*a), ring(*b), _shared((2, 2, PIECE, PIECE), dtype), barriers(), barriers()),
        grid=(MULTIPROCESSORS,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * size * 8)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle // size)),
                                                plgpu.SwizzleTransform(swizzle)))


class _Ring(NamedTuple):
    """Stages of shared memory; full, empty: barriers with two arrivals a stage, from two copies and two warpgroups."""

    a: Any
    b: Any
    full: Any
    empty: Any

    def stage(self, step: Any) -> Any:
        return lax.rem(step, self.a.shape[0])


def _run(tiles: Tiles, count: Any, work: Callable[[Any], _Work], a_turned: bool, b_turned: bool, a_smem: Any,
         b_smem: Any, out_smem: Any, full: Any, empty: Any) -> None:
    """Pieces `program`, `program` + MULTIPROCESSORS, ... below `count`. a_turned, b_turned: whether an operand lies the
    other way round than the product."""
    program, ring = lax.axis_index("program"), _Ring(a_smem, b_smem, full, empty)
    turns = lax.div(count - program + MULTIPROCESSORS - 1, MULTIPROCESSORS)
    piece = lambda i: work(program + i * MULTIPROCESSORS)  # noqa: E731
    lax.cond(lax.axis_index("warpgroup") == LOADER, functools.partial(_load, tiles.stages, turns, piece, ring),
             functools.partial(_multiply, tiles, turns, piece, ring, out_smem, a_turned, b_turned))


def _load(stages: int, turns: Any, piece: Callable[[Any], _Work], ring: _Ring) -> None:
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

    def fetch(part, k, step):
        here = ring.stage(step)

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(ring.empty.at[here])

        plgpu.copy_gmem_to_smem(part.left(k), ring.a.at[here], ring.full.at[here])
        plgpu.copy_gmem_to_smem(part.right(k), ring.b.at[here], ring.full.at[here])
        return step + 1

    def one_piece(i, step):
        for part in piece(i).sums:
            step = lax.fori_loop(0, part.steps, functools.partial(fetch, part), step)
        return step

    steps = lax.fori_loop(0, turns, one_piece, jnp.int32(0))

    @pl.loop(lax.max(steps - stages, jnp.int32(0)), steps)
    def _(step):  # until every stage is free, so that no barrier has an arrival that nobody saw
        plgpu.barrier_wait(ring.empty.at[ring.stage(step)])


def _multiply(tiles: Tiles, turns: Any, piece: Callable[[Any], _Work], ring: _Ring, out_smem: Any, a_turned: bool,
              b_turned: bool) -> None:
    plgpu.set_max_registers(MULTIPLIER_REGISTERS, action="increase")
    warpgroup = lax.axis_index("warpgroup")
    rows, columns = _half(tiles, warpgroup)
    whole = slice(None)

    def one_piece(i, step):
        here = piece(i)
        steps = here.steps

        def summed(count, step, then, acc):
            def add(k, step):
                stage = ring.stage(step)
                plgpu.barrier_wait(ring.full.at[stage])
                a = ring.a.at[(stage, whole, rows) if a_turned else (stage, rows, whole)]
                b = ring.b.at[(stage, columns, whole) if b_turned else (stage, whole, columns)]
                plgpu.wgmma(acc, _turned(a, a_turned), _turned(b, b_turned))
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)  # the step before is done with its stage
                def _():
                    plgpu.barrier_arrive(ring.empty.at[ring.stage(step - 1)])

                return step + 1

            lax.fori_loop(0, count, add, step)
            result = acc[...]

            @pl.when(count > 0)
            def _():
                plgpu.barrier_arrive(ring.empty.at[ring.stage(step + count - 1)])

            return then(result)

        def store(result):
            result = result if here.scale is None else result * here.scale()
            _store(result.astype(out_smem.dtype), out_smem.at[warpgroup], here.out.at[rows, columns])

        def part(index, total):
            first = index * tiles.promoted
            count = lax.min(steps - first, jnp.int32(tiles.promoted))
            return scoped(functools.partial(summed, count, step + first, lambda result: total + result))

        scoped = functools.partial(pl.run_scoped, acc=plgpu.ACC(tiles.half, jnp.float32))
        if tiles.promoted:
            parts = lax.div(steps + tiles.promoted - 1, tiles.promoted)
            store(lax.fori_loop(0, parts, part, jnp.zeros(tiles.half, jnp.float32)))
        else:
            scoped(functools.partial(summed, steps, step, store))

        return step + steps

    lax.fori_loop(0, turns, one_piece, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(result: jax.Array, out_smem: Any, out_gmem: Any) -> None:
    """Piece by piece through two buffers, the copies under way while the next is written."""
    rows, columns = result.shape
    for index, (row, column) in enumerate((r, c) for r in range(0, rows, PIECE) for c in range(0, columns, PIECE)):
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        out_smem[index % 2] = result[row : row + PIECE, column : column + PIECE]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[index % 2], out_gmem.at[pl.ds(row, PIECE), pl.ds(column, PIECE)])


def _varying(out: jax.Array, *inputs: jax.Array) -> jax.Array:
    """Inside a `shard_map`: `out` as what differs over the axes that `inputs` differ over, which a kernel does not say
    of its result."""
    varying = lambda a: jax.typeof(a).manual_axis_type.varying  # noqa: E731
    axes = frozenset().union(*map(varying, inputs)) - varying(out)
    return lax.pcast(out, tuple(axes), to="varying") if axes else out


def _half(tiles: Tiles, warpgroup: Any) -> tuple[Any, Any]:
    """The rows and columns of a piece that a warpgroup makes."""
    rows, columns = tiles.half
    if tiles.halved == "rows":
        return pl.ds(warpgroup * rows, rows), pl.ds(0, columns)
    return pl.ds(0, rows), pl.ds(warpgroup * columns, columns)


def _turned(ref: Any, turned: bool) -> Any:
    return ref.transpose((1, 0)) if turned else ref
