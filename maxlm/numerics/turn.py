"""Turning arrays of 8-bit values, which products of them ask for: on NVIDIA GPUs by a kernel in Pallas-Triton, 0.33
instead of 0.44 ms for 270336 x 2048 on an H200."""

from __future__ import annotations

import functools
import math

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from maxlm.parallel.sharding import free_axes, has_mesh

TILE = 128  # rows and columns of a program


def turned(x: jax.Array, count: int) -> jax.Array:
    """x with its first `count` dims last."""
    order = (*range(count, x.ndim), *range(count))
    return jax.lax.platform_dependent(x, cuda=functools.partial(turned_by_parts, count=count),
                                      default=lambda x: x.transpose(order))


def swapped(x: jax.Array) -> jax.Array:
    """x [..., M, N] of one device with its last two dims exchanged. Row-major before and after: left alone, XLA lays
    out the 16-bit values so that the 8-bit ones need no turn, and turns the 16-bit ones for everything else."""
    return jax.lax.platform_dependent(x, cuda=_by_nvidia, default=_by_xla)


def turned_by_parts(x: jax.Array, count: int) -> jax.Array:
    """`turned`, each device's part of x by itself."""
    def local(x):
        first, last = x.shape[:count], x.shape[count:]
        return _by_nvidia(x.reshape(math.prod(first), math.prod(last))).reshape(*last, *first)

    if not has_mesh():
        return local(x)
    layout = jax.typeof(x).sharding.spec
    return jax.shard_map(local, in_specs=layout, out_specs=P(*layout[count:], *layout[:count]),
                         axis_names=free_axes())(x)


def _by_xla(x):
    return _row_major(_row_major(x).swapaxes(-1, -2))


def _row_major(a):
    return with_layout_constraint(a, Layout(major_to_minor=tuple(range(a.ndim))))


def _by_nvidia(x):
    (M, N) = x.shape[-2:]
    if min(math.gcd(M, TILE), math.gcd(N, TILE)) < 32:
        return _by_xla(x)
    return swap_tiles(x.reshape(-1, M, N)).reshape(*x.shape[:-2], N, M)


def swap_tiles(x_BMN: jax.Array, *, interpret: bool = False) -> jax.Array:
    """[B, N, M], tile by tile, each read and written once; tiles are as large as M and N, multiples of 32, let them be.
    """
    from jax.experimental import pallas as pl  # slow to import
    from jax.experimental.pallas import triton

    B, M, N = x_BMN.shape
    rows, columns = math.gcd(M, TILE), math.gcd(N, TILE)

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...].T

    return pl.pallas_call(
        kernel, grid=(M // rows, N // columns, B), interpret=interpret,
        in_specs=[pl.BlockSpec((None, rows, columns), lambda i, j, b: (b, i, j))],
        out_specs=pl.BlockSpec((None, columns, rows), lambda i, j, b: (b, j, i)),
        out_shape=jax.ShapeDtypeStruct((B, N, M), x_BMN.dtype, manual_axis_type=jax.typeof(x_BMN).manual_axis_type),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=1), name="turn",
    )(x_BMN)
