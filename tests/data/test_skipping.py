"""Which data a step reads once batches were skipped."""

import random

import pytest

from maxlm.data.skipping import data_index, skip


def by_hand(step, indices):
    """Counts up through every data index that was not skipped."""
    index = -1
    for _ in range(step + 1):
        index += 1
        while index in indices:
            index += 1
    return index


@pytest.mark.parametrize("seed", range(20))
def test_a_step_reads_the_kth_index_that_was_not_skipped(seed):
    draw = random.Random(seed)
    skipped, indices = (), set()
    for _ in range(draw.randint(0, 4)):
        first = draw.randint(0, 40)
        more = range(first, first + draw.randint(1, 6))
        skipped, indices = skip(skipped, more), indices | set(more)
    assert [data_index(step, skipped) for step in range(60)] == [by_hand(step, indices) for step in range(60)]
    assert all(a[0] < a[1] < b[0] for a, b in zip(skipped, skipped[1:], strict=False)), "disjoint, merged, ascending"
    assert sum(stop - first for first, stop in skipped) == len(indices)


def test_skipping_what_steps_read_moves_only_them_and_what_follows():
    skipped = skip((), range(10, 13))
    assert skipped == ((10, 13),)
    again = skip(skipped, [data_index(step, skipped) for step in range(9, 12)])
    assert again == ((9, 15),)
    assert [data_index(step, again) for step in (8, 9, 10)] == [8, 15, 16]
