"""The spread of tokens over rows as kernels for NVIDIA GPUs, in Pallas-Triton. One reads each token once and writes it
to all of its rows, where a gather reads each as often as it has rows; the other gathers 8-bit tokens and turns them.

Dims: N tokens, K choices a token, R rows, D width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

TOKENS, COLUMNS, ROWS = 8, 512, 64  # at most, of a program: what ran fastest on an H200
TURNED = 128, 256  # rows and columns, at most, of a program that turns them
MOST = 2**31  # numbers that the kernel's 32-bit offsets reach


def fits(x_ND: jax.Array, choice_R: jax.Array) -> bool:
    """Whether blocks are wide enough to be worth it: Triton's have powers of two."""
    return math.gcd(x_ND.shape[1], COLUMNS) >= 64 and max(choice_R.size, len(x_ND)) * x_ND.shape[1] <= MOST


def scatter_tokens(x_ND: jax.Array, choice_R: jax.Array, row_NK: jax.Array, *, interpret: bool = False) -> jax.Array:
    """[R, D]: x[n] in the rows of n that are below R, which no other choice has; 0 in rows of no choice (choice_R is
    N * K or more). So each row is written once: by a program of its token, or by one that clears."""
    (N, D), K, R, dtype = x_ND.shape, row_NK.shape[1], choice_R.size, x_ND.dtype
    if dtype.itemsize == 1:  # Triton has E4M3 on GPUs with units for it alone
        x_ND = jax.lax.bitcast_convert_type(x_ND, jnp.uint8)
    tokens, columns, rows = math.gcd(N, TOKENS), math.gcd(D, COLUMNS), math.gcd(R, ROWS)
    spreading = N // tokens

    def kernel(x_ref, choice_ref, row_ref, out_ref):
        program, first = pl.program_id(0), pl.program_id(1) * columns

        @pl.when(program < spreading)
        def _():
            here = pl.ds(program * tokens, tokens)
            values = x_ref[here, pl.ds(first, columns)]
            column = jnp.broadcast_to(first + jnp.arange(columns, dtype=jnp.int32), values.shape)
            for k in range(K):
                row = jnp.broadcast_to(row_ref[here, k][:, None], values.shape)
                triton.store(out_ref.at[row, column], values, mask=row < R)

        @pl.when(program >= spreading)
        def _():
            here = pl.ds((program - spreading) * rows, rows)
            empty = jnp.broadcast_to(choice_ref[here][:, None] >= N * K, (rows, columns))
            triton.store(out_ref.at[here, pl.ds(first, columns)], jnp.zeros(empty.shape, x_ND.dtype), mask=empty)

    whole = lambda *shape: pl.BlockSpec(shape, lambda i, j: (0,) * len(shape))  # noqa: E731
    operands = x_ND, choice_R, row_NK
    out_RD = pl.pallas_call(
        kernel, grid=(spreading + R // rows, D // columns), interpret=interpret,
        in_specs=[whole(*a.shape) for a in operands], out_specs=whole(R, D),
        out_shape=jax.ShapeDtypeStruct((R, D), x_ND.dtype, manual_axis_type=jax.typeof(x_ND).manual_axis_type),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1), name="spread",
    )(*operands)
    return jax.lax.bitcast_convert_type(out_RD, dtype)


def fits_turned(x_ND: jax.Array, choice_R: jax.Array) -> bool:
    R, D = choice_R.size, x_ND.shape[1]
    return min(math.gcd(R, TURNED[0]), math.gcd(D, TURNED[1])) >= 64 and max(R, len(x_ND)) * D <= MOST


def gather_turned(x_ND: jax.Array, choice_R: jax.Array, choices: int, *, interpret: bool = False) -> jax.Array:
    """[D, R] of 8-bit tokens: in each column the token of its row's choice, n * choices + k; 0 where there is none."""
    (N, D), R = x_ND.shape, choice_R.size
    rows, columns = math.gcd(R, TURNED[0]), math.gcd(D, TURNED[1])
    across = D // columns

    def kernel(x_ref, choice_ref, out_ref):
        block, first = pl.program_id(0) // across, (pl.program_id(0) % across) * columns
        choice = choice_ref[pl.ds(block * rows, rows)]
        held, token = (jnp.broadcast_to(a[:, None], (rows, columns)) for a in (
            choice < N * choices, jnp.where(choice < N * choices, choice // choices, 0)))
        column = jnp.broadcast_to(first + jnp.arange(columns, dtype=jnp.int32), (rows, columns))
        values = triton.load(x_ref.at[token, column], mask=held, other=0)
        out_ref[pl.ds(first, columns), pl.ds(block * rows, rows)] = values.T

    whole = lambda *shape: pl.BlockSpec(shape, lambda i: (0,) * len(shape))  # noqa: E731
    turned_DR = pl.pallas_call(
        kernel, grid=(R // rows * across,), interpret=interpret, in_specs=[whole(N, D), whole(R)],
        out_specs=whole(D, R),
        out_shape=jax.ShapeDtypeStruct((D, R), jnp.uint8, manual_axis_type=jax.typeof(x_ND).manual_axis_type),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=1), name="spread_turned",
    )(jax.lax.bitcast_convert_type(x_ND, jnp.uint8), choice_R)
    return jax.lax.bitcast_convert_type(turned_DR, x_ND.dtype)
