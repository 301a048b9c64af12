"""Which row of a buffer holds which token.

Tokens chosen by several experts are spread over rows that stand together expert by expert, so that one grouped product
serves them all; afterwards each token collects its rows (kernels/grouped_matmul/rows.py).

Dims: N tokens, K choices a token, R rows, D width, E experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maxlm.kernels.grouped_matmul import Plan

BLOCK = 256  # choices counted at once: sums of fewer ones are exact in any arithmetic


def grouped_plan(expert_NK: jax.Array, num_experts: int, num_rows: int, multiple: int = 1) -> Plan:
    """Rows in order of expert; choices of an expert outside [0, num_experts) are not placed.

    Each expert's rows start at a multiple of `multiple` (a kernel's block). With `num_rows` from `rows_needed` every
    choice finds its place; with fewer, the last ones do not and say so in row_NK.
    """
    rank_NK, count_E = _ranks(expert_NK, num_experts)
    sizes_E = -(-count_E // multiple) * multiple
    start_E = jnp.cumsum(sizes_E) - sizes_E
    row_NK = start_E[jnp.clip(expert_NK, 0, num_experts - 1)] + rank_NK
    row_NK = jnp.where(_inside(expert_NK, num_experts), jnp.minimum(row_NK, num_rows), num_rows)
    return Plan(_choices(row_NK, num_rows), row_NK, _fit(sizes_E, num_rows))


def _inside(expert_NK: jax.Array, num_experts: int) -> jax.Array:
    return (expert_NK >= 0) & (expert_NK < num_experts)


def _ranks(expert_NK: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """How many earlier choices went to the same expert, int32 [N, K], and how many went to each in all.

    Counted in blocks, by a product with a triangle of ones: compilers for TPUs take minutes over a long sort.
    """
    blocks = -(-expert_NK.size // BLOCK)
    expert_C = jnp.pad(expert_NK.reshape(-1), (0, blocks * BLOCK - expert_NK.size), constant_values=-1)
    one_bSE = expert_C.reshape(blocks, BLOCK, 1) == jnp.arange(num_experts)[None, None]
    earlier_SS = jnp.tril(jnp.ones((BLOCK, BLOCK), jnp.float32), -1)
    within_bSE = jnp.einsum("st,bte->bse", earlier_SS, one_bSE.astype(jnp.float32)).astype(jnp.int32)
    count_bE = jnp.sum(one_bSE, axis=1, dtype=jnp.int32)
    before_bE = jnp.cumsum(count_bE, axis=0) - count_bE
    rank_bS = jnp.sum(jnp.where(one_bSE, within_bSE + before_bE[:, None], 0), axis=-1)
    return rank_bS.reshape(-1)[: expert_NK.size].reshape(expert_NK.shape), jnp.sum(count_bE, axis=0)


def rows_needed(choices: int, num_experts: int, multiple: int = 1) -> int:
    """Rows that hold `choices` choices however they fall, each expert's rounded up to `multiple`."""
    most = choices + min(choices, num_experts) * (multiple - 1)
    return -(-most // multiple) * multiple


def slotted_plan(expert_NK: jax.Array, num_experts: int, capacity: int, multiple: int = 1) -> Plan:
    """Room for `capacity` choices of every expert (GShard, arXiv:2006.16668), in rows rounded up to `multiple`: the
    choices of an expert beyond that, later tokens first, are not placed."""
    slot = -(-capacity // multiple) * multiple
    num_rows = num_experts * slot
    rank_NK, _ = _ranks(expert_NK, num_experts)
    placed_NK = _inside(expert_NK, num_experts) & (rank_NK < capacity)
    row_NK = jnp.where(placed_NK, expert_NK * slot + rank_NK, num_rows)
    return Plan(_choices(row_NK, num_rows), row_NK, jnp.full(num_experts, slot, jnp.int32))


def _choices(row_NK: jax.Array, num_rows: int) -> jax.Array:
    """The choice of each row, from the row of each choice: a scatter of integers in which no row is named twice."""
    count = row_NK.size
    row_C = jnp.where(row_NK.reshape(-1) < num_rows, row_NK.reshape(-1), num_rows + jnp.arange(count, dtype=jnp.int32))
    empty_R = jnp.full(num_rows, count, jnp.int32)
    return empty_R.at[row_C].set(jnp.arange(count, dtype=jnp.int32), mode="drop", unique_indices=True)


def _fit(sizes_E: jax.Array, num_rows: int) -> jax.Array:
    """The sizes with what lies beyond the buffer cut off."""
    end_E = jnp.minimum(jnp.cumsum(sizes_E), num_rows)
    return jnp.diff(end_E, prepend=0).astype(jnp.int32)


def unplaced(plan: Plan) -> jax.Array:
    """Which choices have no row, bool [N, K]."""
    return plan.row_NK >= plan.choice_R.size


def by_row(value_NK: jax.Array, plan: Plan) -> jax.Array:
    """A number of each choice, at its row, [R]; 0 in rows that hold nothing."""
    return _by_row(value_NK, plan)


@jax.custom_vjp
def _by_row(value_NK, plan):
    held_R = plan.choice_R < value_NK.size
    return jnp.where(held_R, value_NK.reshape(-1)[jnp.where(held_R, plan.choice_R, 0)], 0)


def _by_row_backward(plan, g_R):
    placed_NK = ~unplaced(plan)
    return jnp.where(placed_NK, g_R[jnp.where(placed_NK, plan.row_NK, 0)], 0), None


_by_row.defvjp(lambda value_NK, plan: (_by_row(value_NK, plan), plan), _by_row_backward)
