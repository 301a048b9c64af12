"""Fits a law to runs: the best parameters over a grid of starts, what follows from them, and predictions.

`point_fit` gives one `Fitted`; everything that a fit can be asked is a function of its `theta`, so the same code serves
the fit itself and thousands of bootstrap replicates of it (`theta` [replicates, p]).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.scaling.laws import TARGET, Law, Natural
from maxlm.scaling.runs import FLOPS_PER_PARAM_TOKEN, Runs
from maxlm.scaling.solver import DELTA, LEAST, PROGRESS, Solutions, Sum, float64_on_cpu, predict_each, solve
from maxlm.schema import require

CLOSEST, EVERY = 128, 8  # of the start grid, ordered by how close it is: so many, and one in so many of all, are run
SAME_OPTIMUM = 1e-6
NEARLY_ZERO = -12.0  # logarithm of a coefficient over the loss
QUADRATIC = 1e9  # a delta that no residual reaches: least squares
SAME_INPUT = 1 - 1e-6  # a correlation of logarithms beyond it
MIN_SPREAD = 1.1  # largest over smallest value of an input below which its exponent cannot be seen
STEEPEST = 10  # an exponent beyond it describes a step between two groups of runs
FAR = 60.0  # the widest allocation looked at, in units of log(params), on each side of the data


@dataclass(frozen=True)
class Fitted:
    """The optimum `theta` [p] of `law` on the rows it was given, with the centring they had."""

    law: Law
    theta: np.ndarray
    centre: Mapping[str, float]
    objective: float
    num_starts: int
    starts_at_optimum: int
    held: Mapping[str, float] = field(default_factory=dict)  # what `Law.held` names, as a value or share of params

    def natural(self, theta: np.ndarray | None = None) -> Natural:
        with np.errstate(over="ignore", invalid="ignore"):  # replicates run away where the data leave a parameter open
            return self.law.natural(self.theta if theta is None else theta, self.centre)

    def inputs(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`columns` as the law's `predict` and `estimate` take them."""
        if self.law.shares:
            return {name: columns[name] for name in self.law.inputs}
        there = [*self.law.inputs, *(name for name in self.law.observed if name in columns)]
        return {name: np.log(columns[name]) - self.centre[name] for name in there}

    def target(self, loss: np.ndarray) -> np.ndarray:
        return np.log(loss) - self.centre[TARGET]

    def log_loss(self, columns: Mapping[str, np.ndarray], theta: np.ndarray | None = None) -> np.ndarray:
        """Logarithm of the predicted loss: [n], or [replicates, n] for `theta` [replicates, p]."""
        theta = self.theta if theta is None else theta
        found = predict_each(self.law.predict, np.atleast_2d(theta), self.inputs(columns)) + self.centre[TARGET]
        return found if np.ndim(theta) == 2 else found[0]

    def residuals(self, runs: Runs) -> np.ndarray:
        """Observed minus predicted log loss [n]: close to the relative error of the loss."""
        return np.log(runs.columns[self.law.target]) - self.log_loss(runs.columns)

    def jacobian(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """d log_loss / d theta, [n, p]."""
        return _jacobian(self.law, self.theta, self.inputs(columns))

    def frontier(self, flops: np.ndarray, per_param_token: float, theta: np.ndarray | None = None) -> Natural:
        """The compute-optimal `params`, `tokens` and `loss` for budgets `flops` [c] = per_param_token * N * D.

        [c], or [replicates, c] for `theta` [replicates, p]. NaN where no division of the budget is best. Other inputs
        of the law are `held`.
        """
        theta = self.theta if theta is None else theta
        budgets = np.log(np.asarray(flops, float) / per_param_token) - self.centre["params"] - self.centre["tokens"]
        held = {name: np.log(value) - self.centre[name] for name, value in self.held.items()}
        for name in held:
            held[name] += self.centre["params"] if self.law.held[name] == "share" else 0.0
        where, loss = _frontier(self.law, np.atleast_2d(theta), budgets, held)
        log_params = where + self.centre["params"]
        log_tokens = np.log(np.asarray(flops, float) / per_param_token) - log_params
        found = {"params": np.exp(log_params), "tokens": np.exp(log_tokens), "loss": np.exp(loss + self.centre[TARGET])}
        found["tokens_per_param"] = found["tokens"] / found["params"]
        return found if np.ndim(theta) == 2 else {name: values[0] for name, values in found.items()}


def point_fit(law: Law, runs: Runs) -> Fitted:
    """The best fit over the law's grid of starts.

    Raises ConfigError where the rows cannot determine the law (`check_design`) or where an exponent at the best fit is
    not between 0 and STEEPEST.
    """
    check_design(law, runs)
    fitted = fit_unchecked(law, runs)
    for name in law.exponents:
        value = fitted.natural()[name]
        require(bool(0 < value < STEEPEST),
                f"{law.name} does not fit these runs: at the best fit {name} = {value:.3g}, and a loss that falls with "
                f"scale has one from 0 to {STEEPEST}; look for diverged runs, mixed-up columns or too narrow a range")
    return fitted


def fit_unchecked(law: Law, runs: Runs, weights: np.ndarray | None = None) -> Fitted:
    """The best fit whatever it says; `weights` [n] count the rows (0 leaves one out by the same program)."""
    held = {name: _held(runs.columns, name, how) for name, how in law.held.items()}
    return replace(_fit(law, runs, weights), held=held)


def _held(columns: Mapping[str, np.ndarray], name: str, how: str) -> float:
    values = columns[name] / columns["params"] if how == "share" else columns[name]
    return float(np.max(values) if how == "largest" else np.median(values))


def _fit(law: Law, runs: Runs, weights: np.ndarray | None) -> Fitted:
    logarithmic = () if law.shares else (*law.inputs, *law.observed)
    centre = {name: float(np.mean(np.log(runs.columns[name]))) for name in logarithmic}
    centre.update({name: centre[other] for name, other in law.same_unit.items()})
    centre[TARGET] = float(np.log(runs.columns[law.target].min()))
    empty = Fitted(law, np.zeros(law.num_parameters), centre, np.inf, 0, 0)
    x, y = empty.inputs(runs.columns), empty.target(runs.columns[law.target])
    if law.estimate:
        theta = law.estimate(x, y, np.ones((1, y.size)) if weights is None else weights[None])[0]
        size = np.abs(predict_each(law.predict, theta[None], x)[0] - y)
        losses = np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2))
        return Fitted(law, theta, centre, float(losses.sum()), 0, 0)
    starts = law.starts(max(float(np.exp(np.median(y))), 1.01))
    distance = (np.abs(predict_each(law.predict, starts, x) - y) * (1 if weights is None else weights)).sum(-1)
    order = np.argsort(np.where(np.isfinite(distance), distance, np.inf), kind="stable")
    chosen = starts[np.union1d(order[:CLOSEST], order[::EVERY])]
    found = solve_law(law, x, y, chosen, weights)
    best = int(np.argmin(found.objective))
    theta, objective = _at_zero(law, x, y, weights, found.theta[best], float(found.objective[best]))
    same = int((found.objective <= objective * (1 + SAME_OPTIMUM)).sum())
    unit = np.exp(2 * centre[TARGET]) if law.least_squares else 1.0  # squares of the loss, or of its logarithm
    return Fitted(law, theta, centre, float(objective * unit), len(chosen), same)


def _at_zero(law, x, y, weights, theta, objective) -> tuple[np.ndarray, float]:
    """The optimum, where coefficients that are 0 but for where a search stopped are the same 0 whatever the order of
    the rows and their units."""
    places = np.array(law.predict.coefficients if isinstance(law.predict, Sum) else (), int)
    places = places[theta[places] < NEARLY_ZERO]
    if not places.size:
        return theta, objective
    start = theta.copy()
    start[places] = LEAST
    found = solve_law(law, x, y, start[None], weights)
    same = found.objective[0] <= objective * (1 + PROGRESS)
    return (found.theta[0], float(found.objective[0])) if same else (theta, objective)


def refit(fitted: Fitted, runs: Runs, weights: np.ndarray) -> np.ndarray:
    """theta [replicates, p] at the optimum for each row of `weights` [replicates, n], started from the fit itself."""
    x, y = fitted.inputs(runs.columns), fitted.target(runs.columns[fitted.law.target])
    if fitted.law.estimate:
        return fitted.law.estimate(x, y, weights)
    starts = np.broadcast_to(fitted.theta, (len(weights), fitted.theta.size))
    return solve_law(fitted.law, x, y, starts, weights).theta


def solve_law(law: Law, x: Mapping[str, np.ndarray], y: np.ndarray, starts: np.ndarray, weights: np.ndarray | None,
              max_iterations: int = 200) -> Solutions:
    """`solve` for the objective of `law`, with `x` and `y` as `Fitted.inputs` and `Fitted.target` give them."""
    if law.least_squares:
        return solve(_loss_itself(law), x, np.exp(y), starts, weights, delta=QUADRATIC, max_iterations=max_iterations)
    return solve(law.predict, x, y, starts, weights, max_iterations=max_iterations)


@functools.cache
def _loss_itself(law):
    """One function object a law, which is what programs are compiled for."""
    return lambda theta, x: jnp.exp(law.predict(theta, x))


def flops_per_param_token(runs: Runs, law: Law | None = None) -> float:
    """C / (N D) of these runs: the median where `flops` was given, else 6. Where `law` has active parameters it is that
    of a model of the median share of them."""
    columns = runs.columns
    if law is not None and "share" in law.held.values():
        (name,) = law.held
        share = _held(columns, name, "share")
        return share * float(np.median(columns["flops"] / (columns[name] * columns["tokens"])))
    if columns.keys() >= {"flops", "params", "tokens"}:
        return float(np.median(columns["flops"] / (columns["params"] * columns["tokens"])))
    return float(FLOPS_PER_PARAM_TOKEN)


def check_design(law: Law, runs: Runs) -> None:
    """Raises ConfigError where these rows cannot determine the law, whatever the losses are."""
    needed = law.num_parameters + 1
    require(len(runs) >= needed, f"{law.name} has {law.num_parameters} parameters and needs at least {needed} runs; "
                                 f"{runs.source} gives {len(runs)}")
    for name in () if law.shares else law.inputs:
        values = runs.columns[name]
        spread = float(values.max() / values.min())
        require(spread >= MIN_SPREAD and np.unique(values).size >= 3,
                f"{law.name} needs runs of different {name}: these have {np.unique(values).size} value(s) over a "
                f"factor of {spread:.3g}; add runs with at least 3 values over a factor of {MIN_SPREAD}")
    target = runs.columns[law.target]
    require(target.max() > target.min(), f"every run has the same {law.target}, {target[0]:.6g}: nothing to fit")
    if law.check:
        law.check(runs.columns)
    if law.has_frontier:
        spread = float(runs.columns["flops"].max() / runs.columns["flops"].min())
        require(spread >= 2, f"{law.name} needs runs of more than one budget: the FLOPs of these span a factor of "
                             f"{spread:.3g}; add runs with other budgets")
    if not law.shares:
        _check_distinct(law, runs)


def _check_distinct(law: Law, runs: Runs) -> None:
    """Raises ConfigError where one input of the law is a power of another, or a product of powers of others."""
    logs = {name: np.log(runs.columns[name]) for name in law.inputs}
    for one, other in itertools.combinations(law.inputs, 2):
        require(abs(np.corrcoef(logs[one], logs[other])[0, 1]) <= SAME_INPUT,
                f"{law.name} cannot tell {one} from {other}: every run has the same ratio of them (up to a power); "
                + ("vary the model size within a budget" if other == "tokens" else f"vary {other} at equal {one}"))
    scaled = np.stack([(values - values.mean()) / values.std() for values in logs.values()], axis=1)
    require(np.linalg.matrix_rank(scaled, tol=1e-3) == len(law.inputs),
            f"{law.name} cannot tell {', '.join(law.inputs)} apart: in every run one of them is the same product of "
            "powers of the others")


@functools.partial(jax.jit, static_argnums=0)
def _jacobian_jit(law, theta, x):
    return jax.jacfwd(law.predict)(theta, x)


def _jacobian(law, theta, x):
    with float64_on_cpu():
        return np.asarray(_jacobian_jit(law, theta, x))


def _frontier(law, theta, budgets, held):
    """Where (log params, centred) the loss is least along log params + log tokens = budget, and its log there."""
    with float64_on_cpu():
        return [np.asarray(a) for a in _frontier_jit(law, theta, budgets, held)]


@functools.partial(jax.jit, static_argnums=0)
def _frontier_jit(law, theta, budgets, held):
    def along(t, budget, log_params):
        others = {name: value + (log_params if law.held[name] == "share" else 0.0) for name, value in held.items()}
        return law.predict(t, {"params": log_params, "tokens": budget - log_params, **others})

    slope = jax.grad(along, argnums=2)

    def best(t, budget):
        """Bisection on the sign of the slope, which is negative left of the optimum."""
        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) / 2
            falls = slope(t, budget, middle) < 0
            return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

        edges = budget / 2 - FAR, budget / 2 + FAR
        low, high = jax.lax.fori_loop(0, 64, halve, edges)
        middle = (low + high) / 2
        inside = (middle > edges[0] + 1e-6) & (middle < edges[1] - 1e-6)
        return jnp.where(inside, middle, jnp.nan), along(t, budget, middle)

    return jax.vmap(lambda t: jax.vmap(lambda b: best(t, b))(budgets))(theta)
