"""Persistent kernels on Hopper GPUs, of three warpgroups a multiprocessor, in Pallas-Mosaic: what the grouped products
(hopper.py, gated.py) have in common.

One warpgroup copies tiles of the operands into shared memory, round a ring of stages, and runs ahead into the next
piece of the result while the other two multiply and store. Two multiprocessors that work on neighbouring columns can
share a piece's left tiles: each fetches half of them for both.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

MULTIPROCESSORS = 132  # of an H100 or H200; with fewer, two programs share one
LOADER, LOADER_REGISTERS, MULTIPLIER_REGISTERS = 2, 40, 232  # of 512 a thread of each of four warps
SQUARE = 64  # rows and columns of the result that leave through shared memory at a time
BUFFERS = 2  # for such, of each warpgroup
PAIR = "pair"  # of multiprocessors


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


class Part(NamedTuple):
    """`steps` steps of one or more sums with the same left operand, and the slices of the operands at each."""

    steps: Any
    left: Callable[[Any], Any]
    rights: tuple[Callable[[Any], Any], ...]


class Piece(NamedTuple):
    """Of the result: the parts that its sums are made of, one after the other, and the pairs of slices that are brought
    behind them; `early(rows)` reads what else it needs before they begin; `results(early, beside, rows, columns,
    *sums)` gives arrays and the slices that they are stored in, where `beside(i)` is pair i."""

    parts: tuple[Part, ...]
    early: Callable[[Any], Any]
    results: Callable[..., Iterator[tuple[Any, Any]]]
    beside: tuple[tuple[Any, Any], ...] = ()

    @property
    def steps(self) -> Any:
        return sum(part.steps for part in self.parts)


class Pieces(NamedTuple):
    """All `count` of them. `scalars(t)` reads from memory what `piece(t, scalars)` depends on: one piece ahead, since
    everything waits for it."""

    count: Any
    scalars: Callable[[Any], tuple]
    piece: Callable[[Any, tuple], Piece]


def kernel(body: Callable, tiles: Tiles, paired: bool, outputs: list[jax.ShapeDtypeStruct], a: tuple,
           b_shape: tuple[int, ...], b_dtype: Any) -> Callable:
    """`body(*inputs, *outputs, *scratch)` as a program for every multiprocessor, two of which share the left operand's
    tiles where they are `paired`. a: shape and dtype of those; b_shape: of the right one's, behind the number of sums.
    """
    ways = {"num_barriers": tiles.stages}
    empty = plgpu.ClusterBarrier(collective_axes=(PAIR,), num_arrivals=2, **ways) if paired else plgpu.Barrier(
        num_arrivals=2, **ways)
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=(_shared((tiles.stages, *a[0]), a[1]), _shared((tiles.stages, *b_shape), b_dtype),
                       _shared((2, BUFFERS, SQUARE, SQUARE), outputs[0].dtype),
                       plgpu.Barrier(num_arrivals=1 + b_shape[0], **ways), empty),
        grid=(MULTIPROCESSORS // (2 if paired else 1),),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({"cluster": (2,), "cluster_names": (PAIR,)} if paired else {}),
    )


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * size * 8)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle // size)),
                                                plgpu.SwizzleTransform(swizzle)))


class _Ring(NamedTuple):
    """Stages of shared memory, of b one tile for each sum; full, empty: barriers of a stage, which every copy and two
    warpgroups arrive at."""

    a: Any
    b: Any
    full: Any
    empty: Any

    def stage(self, step: Any) -> Any:
        return lax.rem(step, self.a.shape[0])


def run(tiles: Tiles, pieces: Pieces, paired: bool, a_turned: bool, b_turned: bool, a_smem: Any, b_smem: Any,
        out_smem: Any, full: Any, empty: Any) -> None:
    """This program's pieces, in turn; a pair has two neighbours at a time. a_turned, b_turned: whether an operand lies
    the other way round than the product."""
    ring = _Ring(a_smem, b_smem, full, empty)
    first = 2 * lax.axis_index("program") + lax.axis_index(PAIR) if paired else lax.axis_index("program")
    turns = lax.div(pieces.count - first + MULTIPROCESSORS - 1, MULTIPROCESSORS)

    def each_piece(do: Callable[[Piece, Any], Any]) -> Any:
        """The steps of all pieces, `do(piece, steps before)` giving those so far."""
        place = lambda i: lax.min(first + i * MULTIPROCESSORS, pieces.count - 1)  # noqa: E731

        def one(i, carry):
            step, scalars = carry
            following = pieces.scalars(place(i + 1))
            return do(pieces.piece(place(i), scalars), step), following

        return lax.fori_loop(0, turns, one, (jnp.int32(0), pieces.scalars(place(0))))[0]

    load = functools.partial(_load, tiles.stages, each_piece, ring, PAIR if paired else None)
    lax.cond(lax.axis_index("warpgroup") == LOADER, load,
             functools.partial(_multiply, tiles, each_piece, ring, out_smem, a_turned, b_turned))


def _load(stages: int, each_piece: Callable, ring: _Ring, pair: str | None) -> None:
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

    def fetch(step, *copies):
        here = ring.stage(step)

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(ring.empty.at[here])

        for source, target, shared_by in copies:
            plgpu.copy_gmem_to_smem(source, target(here), ring.full.at[here], collective_axes=shared_by)
        return step + 1

    def one(part, k, step):
        rights = [(right(k), lambda here, index=index: ring.b.at[here, index], None)
                  for index, right in enumerate(part.rights)]
        return fetch(step, (part.left(k), lambda here: ring.a.at[here], pair), *rights)

    def all_parts(piece, step):
        for part in piece.parts:
            step = lax.fori_loop(0, part.steps, functools.partial(one, part), step)
        for left, right in piece.beside:
            step = fetch(step, (left, lambda here: ring.a.at[here], None),
                         (right, lambda here: ring.b.at[here, 0, pl.ds(0, ring.a.shape[1])], None))
        return step

    steps = each_piece(all_parts)

    @pl.loop(lax.max(steps - stages, jnp.int32(0)), steps)
    def _(step):  # until every stage is free, so that no barrier has an arrival that nobody saw
        plgpu.barrier_wait(ring.empty.at[ring.stage(step)])


def _multiply(tiles: Tiles, each_piece: Callable, ring: _Ring, out_smem: Any, a_turned: bool, b_turned: bool) -> None:
    plgpu.set_max_registers(MULTIPLIER_REGISTERS, action="increase")
    warpgroup, sums = lax.axis_index("warpgroup"), ring.b.shape[1]
    rows, columns = _half(tiles, warpgroup)
    whole = slice(None)
    scoped = lambda do: pl.run_scoped(do, *[plgpu.ACC(tiles.half, jnp.float32)] * sums)  # noqa: E731

    def summed(count, step, then, *accs):
        def add(k, step):
            stage = ring.stage(step)
            plgpu.barrier_wait(ring.full.at[stage])
            a = ring.a.at[(stage, whole, rows) if a_turned else (stage, rows, whole)]
            for index, acc in enumerate(accs):
                b = ring.b.at[(stage, index, columns, whole) if b_turned else (stage, index, whole, columns)]
                plgpu.wgmma(acc, _turned(a, a_turned), _turned(b, b_turned))
            plgpu.wgmma_wait(sums)

            @pl.when(k > 0)  # the step before is done with its stage
            def _():
                plgpu.barrier_arrive(ring.empty.at[ring.stage(step - 1)])

            return step + 1

        lax.fori_loop(0, count, add, step)
        results = [acc[...] for acc in accs]

        @pl.when(count > 0)
        def _():
            plgpu.barrier_arrive(ring.empty.at[ring.stage(step + count - 1)])

        return then(*results)

    def one_piece(piece, step):
        steps, early = piece.steps, piece.early(rows)

        def store(*sums):
            beside = functools.partial(_beside, ring, step + steps, rows)
            _store(piece.results(early, beside, rows, columns, *sums), out_smem.at[warpgroup])

        def part(index, total):
            first = index * tiles.promoted
            count = lax.min(steps - first, jnp.int32(tiles.promoted))
            return scoped(functools.partial(summed, count, step + first, lambda result: total + result))

        if tiles.promoted:
            parts = lax.div(steps + tiles.promoted - 1, tiles.promoted)
            store(lax.fori_loop(0, parts, part, jnp.zeros(tiles.half, jnp.float32)))
        else:
            scoped(functools.partial(summed, steps, step, store))
        return step + steps + len(piece.beside)

    each_piece(one_piece)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _beside(ring: _Ring, first: Any, rows: Any, index: int) -> tuple[jax.Array, jax.Array]:
    """This warpgroup's rows of pair `index`, which are in the stages of the steps from `first` on."""
    stage = ring.stage(first + index)
    plgpu.barrier_wait(ring.full.at[stage])
    pair = tuple(ref[stage, *here, rows, slice(None)] for ref, here in ((ring.a, ()), (ring.b, (0,))))
    plgpu.commit_smem()  # all threads have read before one of them gives the stage back
    plgpu.barrier_arrive(ring.empty.at[stage])
    return pair


def _store(results: Iterator[tuple[jax.Array, Any]], out_smem: Any) -> None:
    """Square by square through buffers, the copies under way while the next is written; a number a row at once."""
    count = 0
    for result, place in results:
        if result.ndim == 1:
            place[...] = result
            continue
        for row, column in itertools.product(*(range(0, size, SQUARE) for size in result.shape)):
            plgpu.wait_smem_to_gmem(BUFFERS - 1, wait_read_only=True)
            square = result[row : row + SQUARE, column : column + SQUARE]
            out_smem[count % BUFFERS] = square.astype(out_smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[count % BUFFERS], place.at[pl.ds(row, SQUARE), pl.ds(column, SQUARE)])
            count += 1
    assert count % BUFFERS == 0, count


def varying(out: jax.Array, *inputs: jax.Array) -> jax.Array:
    """Inside a `shard_map`: `out` as what differs over the axes that `inputs` differ over, which a kernel does not say
    of its result."""
    over = lambda a: jax.typeof(a).manual_axis_type.varying  # noqa: E731
    axes = frozenset().union(*map(over, inputs)) - over(out)
    return lax.pcast(out, tuple(axes), to="varying") if axes else out


def _half(tiles: Tiles, warpgroup: Any) -> tuple[Any, Any]:
    """The rows and columns of a piece that a warpgroup makes."""
    rows, columns = tiles.half
    if tiles.halved == "rows":
        return pl.ds(warpgroup * rows, rows), pl.ds(0, columns)
    return pl.ds(0, rows), pl.ds(warpgroup * columns, columns)


def _turned(ref: Any, turned: bool) -> Any:
    return ref.transpose((1, 0)) if turned else ref
