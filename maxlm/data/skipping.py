"""Which data a step reads once batches were skipped: a pure function of the step and of the list of what was skipped.

A list of skipped data is ascending, disjoint ranges of data indices, each (first, stop) with `stop` not in it. Step k
(counted from 0) reads the k-th data index that is in none of them: k itself while nothing was skipped.
"""

from __future__ import annotations

from collections.abc import Iterable

Skipped = tuple[tuple[int, int], ...]


def data_index(step: int, skipped: Skipped) -> int:
    """The data index that step `step` reads."""
    index = step
    for first, stop in skipped:
        if index < first:
            break
        index += stop - first
    return index


def skip(skipped: Skipped, more: Iterable[int]) -> Skipped:
    """`skipped` with the data indices `more` in it as well."""
    indices = sorted(set(more).union(*(range(first, stop) for first, stop in skipped)))
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return tuple(ranges)
