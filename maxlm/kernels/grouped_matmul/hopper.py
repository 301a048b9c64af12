"""Grouped products on Hopper GPUs. Each group's rows are a multiple of ROWS, so that no piece of the result, and no
step of a weight's gradient, holds rows of two groups: nothing is masked.

Operands are bfloat16 (or float16), or of 8 bits; accumulation is float32 in the tensor cores' own precision, and for
8-bit gradients of weights in registers (`Tiles.promoted`). The units take operands of 8 bits only with what is summed
over in the last dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from maxlm.kernels.grouped_matmul.persistent import SQUARE, Part, Piece, Pieces, Tiles, kernel, run, varying

ROWS = 128  # every group's rows are a multiple of this


def _product_tiles(columns: int) -> Tiles:
    """What ran fastest on an H100 of rows and columns halved, and 128 or 256 columns (docs/MOE.md)."""
    return Tiles(ROWS, 256, "columns", 4) if columns % 256 == 0 else Tiles(ROWS, 128, "columns", 6)


def _weights_tiles(columns: int, eight_bit: bool) -> Tiles:
    """8-bit sums over all rows of a group are promoted, as those of dense layers are (numerics/fp8.py): of numbers of
    one sign they were 6 to 12% off, and are 0.2% so, at 1,105 to 1,156 instead of 1,531 TFLOP/s (docs/LOG.md)."""
    if eight_bit:
        return Tiles(128, 128, "rows", 6, promoted=1)
    return Tiles(128, 256, "rows", 4) if columns % 256 == 0 else Tiles(128, 128, "columns", 6)


def grouped_product(pairs: Sequence[tuple[jax.Array, jax.Array]], sizes_E: jax.Array,
                    scale_E: jax.Array | None = None, *, b_last: bool, tiles: Tiles | None = None) -> jax.Array:
    """[R, N]: the sum over pairs (a, b) of the rows of a, each times its group's matrix of b, times the group's scale;
    0 behind the last group, whatever a holds there. a: [R, K]; b: [E, K, N], or where `b_last` [E, N, K]. In bfloat16
    where they have 8 bits.

    sizes_E: int32, multiples of ROWS. K: a multiple of 128 bytes, N: of 128.
    """
    scales = () if scale_E is None else (jnp.append(scale_E.astype(jnp.float32), 0.0),)  # 0 behind the last group

    def early(refs, group, rows):
        return [scale_gmem[group] for scale_gmem in refs]

    def results(scale, beside, total):
        yield 0, 0, total * scale[0] if scale else total

    (out_RN,) = over_rows([(a, (b,)) for a, b in pairs], sizes_E, scales, early, results, 1, b_last=b_last,
                          tiles=tiles or _product_tiles(pairs[0][1].shape[1 if b_last else 2]))
    return out_RN


def over_rows(parts: Sequence[tuple[jax.Array, tuple[jax.Array, ...]]], sizes_E: jax.Array,
              extras: Sequence[jax.Array], early: Callable, results: Callable, outputs: int, *, b_last: bool,
              tiles: Tiles, beside: tuple[jax.Array, jax.Array] | None = None) -> list[jax.Array]:
    """`outputs` arrays [R, N] made of sums of grouped products: sum i is that over parts (a, bs) of a's rows with
    bs[i]. `early(refs of extras, group, rows)` reads what `results(early, beside, *sums)` needs for a slice of rows;
    the group is E behind the last. It yields (output, first column, array), in squares of SQUARE at least.

    beside: two arrays [R, N] in a's dtype, of which results' `beside(i)` gives the i-th SQUARE columns of a warpgroup's
    rows ('rows' halved); there is then one more output, [N / columns, R] in float32, which results yields rows of.
    tiles.columns: of each sum.
    """
    (a, bs), E = parts[0], sizes_E.size
    R, N, depth = a.shape[0], bs[0].shape[1 if b_last else 2], tiles.depth // a.dtype.itemsize
    assert tiles.rows == ROWS and R % ROWS == 0 and N % tiles.columns == 0, (R, N, tiles)
    assert all(a.shape[1] % depth == 0 and b.shape[0] == E for a, bs in parts for b in bs), [a.shape for a, _ in parts]
    across, brought = N // tiles.columns, beside or ()
    assert not brought or (len(bs) == 1 and b_last and depth == SQUARE and tiles.halved == "rows"
                           and tiles.columns >= ROWS), tiles
    end_E = jnp.cumsum(sizes_E) // ROWS
    group_t = jnp.sum(jnp.arange(R // ROWS)[:, None] >= end_E[None], axis=1, dtype=jnp.int32)  # E: behind the last
    shapes = [_out((R, N), a.dtype)] * outputs + [jax.ShapeDtypeStruct((across, R), jnp.float32)] * bool(brought)

    def body(group_gmem, *refs):
        refs = iter(refs)
        extra_gmem, operands = [next(refs) for _ in extras], [(next(refs), [next(refs) for _ in bs]) for _ in parts]
        brought_gmem, out_gmem = [next(refs) for _ in brought], [next(refs) for _ in shapes]

        def piece(t: Any, scalars: tuple) -> Piece:
            (group,), down, along = scalars, lax.div(t, across), lax.rem(t, across)
            rows, columns = pl.ds(down * ROWS, ROWS), pl.ds(along * tiles.columns, tiles.columns)

            def one(a_gmem, bs_gmem):
                summed = lambda k: pl.ds(k * depth, depth)  # noqa: E731
                b_tile = (lambda k: (columns, summed(k))) if b_last else (lambda k: (summed(k), columns))
                steps = lax.select(group < E, a_gmem.shape[1] // depth, 0)
                return Part(steps, lambda k: a_gmem.at[rows, summed(k)],
                            tuple(lambda k, b_gmem=b_gmem: b_gmem.at[(group, *b_tile(k))] for b_gmem in bs_gmem))

            def stored(early, beside, here, columns_here, *sums):
                for output, first, result in results(early, beside, *sums):
                    if result.ndim == 1:
                        yield result, out_gmem[output].at[along, rows].at[here]
                    else:
                        place = out_gmem[output].at[rows, columns].at[here, columns_here]
                        yield result, place.at[:, pl.ds(first, result.shape[1])]

            near = tuple(tuple(ref.at[rows, columns].at[:, pl.ds(first, SQUARE)] for ref in brought_gmem)
                         for first in range(0, tiles.columns if brought else 0, SQUARE))
            read = lambda here: early(extra_gmem, group, pl.ds(down * ROWS + here.start, here.size))  # noqa: E731
            return Piece(tuple(one(*operand) for operand in operands), read, stored, near)

        pieces = Pieces(R // ROWS * across, lambda t: (group_gmem[lax.div(t, across)],), piece)
        run(tiles, pieces, paired, False, b_last, *refs)

    b_shape = (tiles.columns, depth) if b_last else (depth, tiles.columns)
    paired = across % 2 == 0
    call = kernel(body, tiles, paired, shapes, ((ROWS, depth), a.dtype), (len(bs), *b_shape), bs[0].dtype)
    outs = call(group_t, *extras, *(array for a, bs in parts for array in (a, *bs)), *brought)
    return [varying(out, sizes_E, bs[0]) for out in outs]


def _out(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype if dtype.itemsize == 2 else jnp.bfloat16)


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
        group_of = lambda t: lax.div(t, down * across)  # noqa: E731

        def piece(t: Any, scalars: tuple) -> Piece:
            (first, steps), here = scalars, lax.rem(t, down * across)
            rows = pl.ds(lax.div(here, across) * tiles.rows, tiles.rows)
            columns = pl.ds(lax.rem(here, across) * tiles.columns, tiles.columns)
            summed = lambda k: pl.ds(pl.multiple_of(first, ROWS) + k * depth, depth)  # noqa: E731
            part = Part(steps, lambda k: a_gmem.at[turn((summed(k), rows))],
                        (lambda k: b_gmem.at[turn((summed(k), columns))],))

            def stored(scale, beside, rows_here, columns_here, total):
                place = out_gmem.at[group_of(t), rows, columns].at[rows_here, columns_here]
                yield total * scale[0] if scale else total, place

            return Piece((part,), lambda _: [ref[0] for ref in scale_gmem], stored)

        scalars = lambda t: (first_gmem[group_of(t)], steps_gmem[group_of(t)])  # noqa: E731
        run(tiles, Pieces(E * down * across, scalars, piece), paired, not rows_last, rows_last, *scratch)

    paired = across % 2 == 0
    call = kernel(body, tiles, paired, [_out((E, M, N), a.dtype)], (turn((depth, tiles.rows)), a.dtype),
                  (1, *turn((depth, tiles.columns))), b.dtype)
    (out,) = call(first_E.astype(jnp.int32), (sizes_E // depth).astype(jnp.int32), *scales, a, b)
    return varying(out, sizes_E, a)
