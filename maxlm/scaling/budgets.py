"""Which runs belong to one compute budget."""

from __future__ import annotations

import numpy as np

BUDGET_GAP = 1.25  # budgets closer than this factor are one budget
BUDGET_WIDTH = 2.0  # a budget wider than this factor is a spread of runs
GROUPS, GROUP_SIZE = 8, 5  # then: at most so many groups, of at least so many runs


def budgets(flops: np.ndarray) -> np.ndarray:
    """Which budget [n] each run belongs to, from 0 for the smallest.

    A gap of more than BUDGET_GAP starts the next. Runs that spread without gaps are divided into equal numbers instead.
    """
    order = np.argsort(flops, kind="stable")
    steps = np.concatenate([[0], np.cumsum(np.diff(np.log(flops[order])) > np.log(BUDGET_GAP))])
    widest = max(np.ptp(np.log(flops[order][steps == k])) for k in range(steps[-1] + 1))
    if widest > np.log(BUDGET_WIDTH):
        steps = np.arange(len(flops)) * min(GROUPS, max(len(flops) // GROUP_SIZE, 1)) // len(flops)
    ranks = np.empty(len(flops), int)
    ranks[order] = steps
    return ranks
