"""The spread of tokens over rows as a kernel for NVIDIA GPUs, in Pallas-Triton: it reads each token once and writes it
to all of its rows, where a gather reads each as often as it has rows.

Dims: N tokens, K choices a token, R rows, D width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

TOKENS, COLUMNS, ROWS = 8, 512, 64  # at most, of a program: what ran fastest on an H200 (docs/MOE.md)
MOST = 2**31  # numbers that the kernel's 32-bit offsets reach


def fits(x_ND: jax.Array, choice_R: jax.Array) -> bool:
    """Whether blocks are wide enough to be worth it: Triton's have powers of two."""
    return math.gcd(x_ND.shape[1], COLUMNS) >= 64 and choice_R.size * x_ND.shape[1] <= MOST


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
