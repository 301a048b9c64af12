"""Loss as a function of the data mixture: one law for each set of columns share_NAME, which sum to 1.

linear        L = sum_i w_i r_i: w_i is the loss that a mixture of domain i alone would have (the regression of RegMix,
              Liu et al. 2024, arXiv:2407.01492; an intercept is a shift of all w_i, since shares sum to 1)
exponential   L = c + exp(sum_i t_i r_i): Ye et al. 2024 (arXiv:2403.16952), whose factor k is a shift of
              all t_i for the same reason

Both are of one size of model and one number of tokens: a mixture that is best for small models need not be for large.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from maxlm.scaling.solver import Sum
from maxlm.schema import require

PREFIX = "share_"
SUM_TOLERANCE = 1e-3
OFFSETS = (0.2, 0.5, 0.8, 0.95)


def linear(names: tuple[str, ...]):
    """predict(theta [k], columns): the log loss; theta holds log w over the smallest loss."""
    return Sum(lambda theta, x: tuple(theta[i] + jnp.log(x[name]) for i, name in enumerate(names)),
               tuple(range(len(names))))


def linear_natural(names: tuple[str, ...]):
    def natural(theta, centre):
        return {f"w_{_short(name)}": np.exp(np.asarray(theta)[..., i] + centre["target"])
                for i, name in enumerate(names)}

    return natural


def linear_starts(names: tuple[str, ...]):
    return lambda excess: np.array([np.full(len(names), level) for level in (0.0, np.log(excess))])


def exponential(names: tuple[str, ...]):
    """predict(theta [1 + k], columns): theta is log c over the smallest loss, and t less the log of it."""
    return Sum(lambda theta, x: (theta[0], sum(theta[1 + i] * x[name] for i, name in enumerate(names))), (0,))


def exponential_natural(names: tuple[str, ...]):
    def natural(theta, centre):
        theta, scale = np.asarray(theta), centre["target"]
        return {"c": np.exp(theta[..., 0] + scale),
                **{f"t_{_short(name)}": theta[..., 1 + i] + scale for i, name in enumerate(names)}}

    return natural


def exponential_starts(names: tuple[str, ...]):
    """The slope of each share from its own sign, in turn: with few shares all combinations, with many some."""
    def starts(excess):
        signs = list(itertools.islice(itertools.product((-1.0, 1.0), repeat=len(names)), 64))
        return np.array([(np.log(offset), *(np.log(excess - offset) + 0.5 * np.array(sign)))
                         for offset in OFFSETS for sign in signs])

    return starts


def check(names: tuple[str, ...]):
    """Raises ConfigError unless the shares of each row sum to 1."""
    def checked(columns):
        total = sum(columns[name] for name in names)
        worst = int(np.argmax(np.abs(total - 1)))
        require(bool(abs(total[worst] - 1) <= SUM_TOLERANCE),
                f"{', '.join(names)} must sum to 1 in each row: in one they sum to {total[worst]:.4g}")
        rank = np.linalg.matrix_rank(np.stack([columns[name] for name in names], axis=1), tol=1e-6)
        require(rank == len(names), f"these mixtures vary in {rank} directions only: {len(names)} shares need as many "
                                    "mixtures that are no combinations of one another")

    return checked


MIRROR_STEPS, MIRROR_MOST, GAP = 20_000, 1e3, 1e-7  # steps, the longest, and what share of the sum may be left to gain


def best_shares(slopes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Shares r [replicates, k] on the simplex at which sum_j weights_j exp(sum_i slopes_ji r_i) is least; `slopes`
    [replicates, j, k], `weights` [j]. The sum is convex, so mirror descent with the entropy finds its one minimum, to a
    Frank-Wolfe gap of GAP; steps grow while they descend and are taken back where they do not."""
    def value(shares):
        return weights * np.exp(np.einsum("rjk,rk->rj", slopes, shares))

    shares = np.full((slopes.shape[0], slopes.shape[2]), 1 / slopes.shape[2])
    step, parts = np.full(len(shares), 0.1), value(shares)
    for _ in range(MIRROR_STEPS):
        gradient = np.einsum("rj,rjk->rk", parts, slopes)
        rise = gradient - gradient.min(1, keepdims=True)
        gap = np.einsum("rk,rk->r", rise, shares)
        if np.all(gap <= GAP * parts.sum(1)):
            break
        tried = shares * np.exp(-step[:, None] * rise)
        tried /= tried.sum(1, keepdims=True)
        there = value(tried)
        better = there.sum(1) <= parts.sum(1)
        shares, parts = np.where(better[:, None], tried, shares), np.where(better[:, None], there, parts)
        step = np.where(better, np.minimum(1.2 * step, MIRROR_MOST), step / 4)
    return shares


def _short(name: str) -> str:
    return name.removeprefix(PREFIX)


class Form(NamedTuple):
    """One law of mixtures; `extra` parameters beyond one a share. The functions take the names of the shares."""

    title: str
    equation: str
    source: str
    extra: int
    predict: Callable
    natural: Callable
    starts: Callable


FORMS = {
    "mixture-linear": Form("linear mixing law", "L = sum_i w_i r_i", "Liu et al. 2024 (arXiv:2407.01492)",
                           0, linear, linear_natural, linear_starts),
    "mixture-exponential": Form("exponential mixing law", "L = c + exp(sum_i t_i r_i)",
                                "Ye et al. 2024 (arXiv:2403.16952)", 1, exponential, exponential_natural,
                                exponential_starts),
}
