"""The two linear maps between tokens and rows, which stand expert by expert: each other's transpose. What a
token's gradient sums has a fixed order, nothing is added concurrently.

Dims: N tokens, K choices a token, R rows, D width, E experts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxlm.numerics.turn import swapped


class Plan(NamedTuple):
    """A placement of N x K choices in R rows.

    choice_R: the choice (n * K + k) that a row holds; N * K or more where it holds none.
    row_NK: the row of each choice; R or more where it was not placed.
    sizes_E: rows that each expert has been given, rounded up to the plan's multiple; they come first, in order.
    """

    choice_R: jax.Array
    row_NK: jax.Array
    sizes_E: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=())
def spread(x_ND: jax.Array, plan: Plan) -> jax.Array:
    """Each token's vector in all of its rows, [R, D]; zeros in rows that hold nothing. Of any format.

    NVIDIA GPUs read each token once (scatter.py), 0.37 instead of 0.59 ms for 2048 bfloat16 in each of 270336 rows on
    an H200, or move narrow numbers as words of 32 bits. Not TPUs, which would pad the dim of two or four that a word is
    made of.
    """
    N, K = plan.row_NK.shape
    held_R = plan.choice_R < N * K
    return jax.lax.platform_dependent(x_ND, jnp.where(held_R, plan.choice_R, 0) // K, held_R, plan.choice_R,
                                      plan.row_NK, cuda=_by_nvidia,
                                      default=lambda x_ND, row_R, held_R, *_: gather_rows(x_ND, row_R, held_R, word=1))


def _by_nvidia(x_ND, token_R, held_R, choice_R, row_NK):
    from maxlm.kernels.grouped_matmul.scatter import fits, scatter_tokens  # Pallas is slow to import

    if fits(x_ND, choice_R):
        return scatter_tokens(x_ND, choice_R, row_NK)
    return gather_rows(x_ND, token_R, held_R, word=4)


def spread_turned(x8_ND: jax.Array, plan: Plan) -> jax.Array:
    """`spread` of 8-bit numbers, [D, R]. On NVIDIA GPUs the rows are not stored on the way: 0.30 instead of 0.52 ms."""
    apart = lambda x8_ND, plan: swapped(jax.lax.optimization_barrier(spread(x8_ND, plan)))  # noqa: E731

    def by_nvidia(x8_ND, plan):
        from maxlm.kernels.grouped_matmul.scatter import fits_turned, gather_turned

        if fits_turned(x8_ND, plan.choice_R):
            return gather_turned(x8_ND, plan.choice_R, plan.row_NK.shape[1])
        return apart(x8_ND, plan)

    return jax.lax.platform_dependent(x8_ND, plan, cuda=by_nvidia, default=apart)


def gather_rows(x_ND: jax.Array, row_R: jax.Array, held_R: jax.Array, *, word: int) -> jax.Array:
    """x[row], 0 where not `held`, moved as integers of `word` bytes where x's numbers are narrower and these fit."""
    (N, D), size = x_ND.shape, x_ND.dtype.itemsize
    if size >= word or D * size % word:
        return jnp.where(held_R[:, None], x_ND[row_R], jnp.zeros((), x_ND.dtype))
    word_NW = jax.lax.bitcast_convert_type(x_ND.reshape(N, D * size // word, word // size), f"uint{8 * word}")
    word_RW = jnp.where(held_R[:, None], word_NW[row_R], jnp.zeros((), word_NW.dtype))
    return jax.lax.bitcast_convert_type(word_RW, x_ND.dtype).reshape(-1, D)


@functools.partial(jax.custom_vjp, nondiff_argnums=())
def collect(rows_RD: jax.Array, plan: Plan) -> jax.Array:
    """The sum of each token's rows, [N, D], added in float32 in the order of its choices."""
    R = plan.choice_R.size
    total_ND = jnp.zeros((plan.row_NK.shape[0], rows_RD.shape[1]), jnp.float32)
    for k in range(plan.row_NK.shape[1]):  # one choice at a time: [N, K, D] never exists
        row_N = plan.row_NK[:, k]
        placed_N = row_N < R
        total_ND += jnp.where(placed_N[:, None], rows_RD[jnp.where(placed_N, row_N, 0)], 0).astype(jnp.float32)
    return total_ND.astype(rows_RD.dtype)


spread.defvjp(lambda x_ND, plan: (spread(x_ND, plan), plan), lambda plan, g_RD: (collect(g_RD, plan), None))
collect.defvjp(lambda rows_RD, plan: (collect(rows_RD, plan), plan), lambda plan, g_ND: (spread(g_ND, plan), None))
