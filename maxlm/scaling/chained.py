"""Two steps to a downstream accuracy: task loss from parameters and tokens, accuracy from task loss, in one law.

Bhagia et al. 2024 (arXiv:2412.04403): step one is L(N, D) for the loss of the task's right answers, by the Huber loss;
step two is a sigmoid from that loss to accuracy, by least squares on the losses that were observed. A forecast chains
them: the accuracy at the loss that step one predicts. Replicates of the bootstrap fit both steps to the same draw of
runs, so that intervals hold the errors of both and what they share.

`theta` is chinchilla's five and the sigmoid's four; the loss between them is over the geometric mean of `task_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from maxlm.scaling.solver import DELTA, predict_each, solve

FIRST = 5  # of theta belong to step one
LEAST_SQUARES = 1e9  # a delta that no residual reaches
CLOSEST = 64


def chain(loss_law: Callable, sigmoid: Callable) -> Callable:
    """predict(theta, columns): log accuracy from params and tokens."""
    return lambda theta, x: sigmoid(theta[FIRST:], {"task_loss": loss_law(theta[:FIRST], x)})


def estimator(loss_law: Callable, loss_starts: Callable, sigmoid: Callable, sigmoid_starts: Callable) -> Callable:
    """estimate(columns, log accuracy, weights [replicates, n]): theta [replicates, 9]."""

    def accuracy(theta, x):
        return jnp.exp(sigmoid(theta, x))

    def estimate(x: Mapping[str, np.ndarray], y: np.ndarray, weights: np.ndarray) -> np.ndarray:
        least = x["task_loss"].min()
        inputs, task = {name: x[name] for name in ("params", "tokens")}, {"task_loss": x["task_loss"]}
        excess = max(float(np.exp(np.median(x["task_loss"] - least))), 1.01)
        first = _fits(loss_law, inputs, x["task_loss"] - least, loss_starts(excess), weights, DELTA)
        first[:, :3] += least  # E, A and B, back over the geometric mean
        spread = max(float(np.exp(np.median(y))), 1.01)
        return np.hstack([first, _fits(accuracy, task, np.exp(y), sigmoid_starts(spread), weights, LEAST_SQUARES)])

    return estimate


def _fits(predict, columns, target, starts, weights, delta) -> np.ndarray:
    """theta [replicates, p]: the best fit to the replicates' mean weight over `starts`, and from it each replicate."""
    far = np.abs(predict_each(predict, starts, columns) - target).sum(1)
    nearest = starts[np.argsort(np.where(np.isfinite(far), far, np.inf), kind="stable")[:CLOSEST]]
    whole = solve(predict, columns, target, nearest, weights.mean(0), delta=delta)
    best = whole.theta[np.argmin(whole.objective)]
    return solve(predict, columns, target, np.broadcast_to(best, (len(weights), best.size)), weights, delta=delta).theta
