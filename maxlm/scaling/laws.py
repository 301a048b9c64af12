"""The laws: what each says, where it is published, and its parameters in a space without bounds or units.

Inside a fit every input column is the logarithm of its value over the geometric mean of the column, and the loss is
over the smallest loss, so that fits do not depend on units and one grid of starts serves every data set. `Law.natural`
turns such a `theta` back into the parameters of the published equation, in the units of the file.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.scaling import chained, envelope, isoflop, mixing
from maxlm.scaling.runs import Runs
from maxlm.scaling.solver import DELTA, Sum
from maxlm.schema import ConfigError, require

TARGET = "target"
Natural = dict[str, np.ndarray]
Centre = Mapping[str, float]  # column -> mean of its logarithm; TARGET -> that of the smallest target


@dataclass(frozen=True, eq=False)  # one object a law: hashed by identity where it is compiled for
class Law:
    """One law of the logarithm of `target`, usually the loss.

    `predict(theta [p], columns)` gives [n] in centred units; `natural(theta [..., p], centre)` named arrays [...];
    `starts(excess)` [s, p], where `excess` is the median target over the smallest. `exponents` are the names of
    `natural` without which in a sensible range the fit means nothing.
    """

    name: str
    title: str
    equation: str
    source: str
    inputs: tuple[str, ...]
    num_parameters: int
    exponents: tuple[str, ...]
    predict: Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array]
    natural: Callable[[np.ndarray, Centre], Natural]
    starts: Callable[[float], np.ndarray]
    coordinates: Mapping[str, int]  # names of `natural` that are a function of one theta alone, and which
    # Where the published procedure is not the Huber fit: theta [replicates, p] from columns, target and weights
    # [replicates, n]; and what it asks of the columns, as a ConfigError.
    estimate: Callable[[Mapping[str, np.ndarray], np.ndarray, np.ndarray], np.ndarray] | None = None
    check: Callable[[Mapping[str, np.ndarray]], None] | None = None
    target: str = "loss"  # the column that is predicted
    lowest: str = ""  # a column: of rows that share the inputs, a sweep, only the one where this is lowest counts
    least_squares: bool = False  # of the loss itself, where that is what is published
    same_unit: Mapping[str, str] = field(default_factory=dict)  # inputs that are centred with another input
    observed: tuple[str, ...] = ()  # columns that `estimate` reads and `predict` does not
    shares: bool = False  # the inputs are shares from 0 to 1, and enter as they are
    prepare: Callable[[Runs], Runs] | None = None  # rows as the law reads them, from rows as they are in the file
    whole_runs: bool = False  # `estimate` does not feel weights: replicates leave runs out
    procedure: str = ""  # of `estimate`, in words
    # For the frontier, where inputs beyond params and tokens are held: at their 'largest' or 'median' value, or as the
    # median 'share' of params.
    held: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """What the parameters minimise."""
        if self.estimate:
            return self.procedure
        if self.least_squares:
            return f"the sum of squared residuals of the {self.target}"
        return f"the sum of Huber losses (delta {DELTA:g}) of residuals of the log {self.target}"

    @property
    def needed(self) -> tuple[str, ...]:
        return (*self.inputs, *self.observed, self.target)

    @property
    def has_frontier(self) -> bool:
        """Whether a compute budget can be divided between parameters and tokens."""
        return self.inputs == ("params", "tokens", *self.held) and self.target == "loss"


OFFSETS = (0.2, 0.5, 0.7, 0.85, 0.95)  # irreducible loss over the smallest loss
SHARES = (0.2, 0.5, 0.8)  # of the reducible loss that is due to the number of parameters
EXPONENTS = (0.05, 0.1, 0.2, 0.35, 0.55, 0.8, 1.2)


def _chinchilla_terms(theta, x):
    e, a, b, alpha, beta = theta
    return e, a - alpha * x["params"], b - beta * x["tokens"]


_chinchilla = Sum(_chinchilla_terms, (0, 1, 2))


def _chinchilla_natural(theta, centre):
    e, a, b, alpha, beta = np.moveaxis(np.asarray(theta), -1, 0)
    scale = centre[TARGET]
    return {"E": np.exp(e + scale), "A": np.exp(a + scale + alpha * centre["params"]),
            "B": np.exp(b + scale + beta * centre["tokens"]), "alpha": alpha, "beta": beta,
            "a": beta / (alpha + beta)}


def _chinchilla_starts(excess):
    return np.array([
        (np.log(offset), np.log(share * (excess - offset)), np.log((1 - share) * (excess - offset)), alpha, beta)
        for offset, share, alpha, beta in itertools.product(OFFSETS, SHARES, EXPONENTS, EXPONENTS)
    ])


_tied = Sum(lambda theta, x: _chinchilla_terms((*theta, theta[3]), x), (0, 1, 2))


def _tied_natural(theta, centre):
    tied = _chinchilla_natural(np.asarray(theta)[..., [0, 1, 2, 3, 3]], centre)
    return {name: tied[name] for name in ("E", "A", "B", "alpha")}


def _tied_starts(excess):
    grid = _chinchilla_starts(excess)
    return grid[grid[:, 3] == grid[:, 4], :4]


def _overtraining_natural(theta, centre):
    """L = E + (a M^eta + b M^-eta) C^-eta with C = 6 N D and M = D / N is the tied law with alpha = 2 eta."""
    tied = _tied_natural(theta, centre)
    scale = 6 ** (tied["alpha"] / 2)
    return {"E": tied["E"], "a": tied["A"] * scale, "b": tied["B"] * scale, "eta": tied["alpha"] / 2}


def _kaplan(theta, x):
    n, d, ratio, alpha_d = theta
    return alpha_d * jnp.logaddexp(n - ratio * x["params"], d - x["tokens"])


def _kaplan_natural(theta, centre):
    n, d, ratio, alpha_d = np.moveaxis(np.asarray(theta), -1, 0)
    scale = centre[TARGET] / alpha_d  # the loss's unit moves into both terms of the sum
    return {"alpha_N": ratio * alpha_d, "alpha_D": alpha_d, "N_c": np.exp((n + scale) / ratio + centre["params"]),
            "D_c": np.exp(d + scale + centre["tokens"]), "a": 1 / (1 + ratio)}


def _kaplan_starts(excess):
    total = np.log(excess)
    return np.array([
        (np.log(share) + total / alpha, np.log(1 - share) + total / alpha, ratio, alpha)
        for share, ratio, alpha in itertools.product(SHARES, (0.4, 0.7, 1.0, 1.5), (0.03, 0.06, 0.1, 0.2, 0.4))
    ])


def _data_constrained(theta, x):
    """`unique_tokens` is centred as `tokens` are. U_N, the parameters for which the unique tokens are compute-optimal,
    follows from the rest of theta; below it parameters count in full."""
    e, a, b, alpha, tokens_halt, params_halt = theta
    unique = jnp.minimum(x["unique_tokens"], x["tokens"])
    optimal = jnp.minimum((a - b) / alpha + unique, x["params"])
    tokens = unique + _discount(x["tokens"] - unique, tokens_halt)
    params = optimal + _discount(x["params"] - optimal, params_halt)
    return _chinchilla((e, a, b, alpha, alpha), {"params": params, "tokens": tokens})


def _discount(log_ratio, log_halt):
    """log(1 + R* (1 - exp(-R / R*))) with R = exp(log_ratio) - 1 repetitions, R* = exp(log_halt)."""
    return jnp.log1p(-jnp.exp(log_halt) * jnp.expm1(-jnp.expm1(log_ratio) * jnp.exp(-log_halt)))


def _data_constrained_natural(theta, centre):
    theta = np.asarray(theta)
    return {**_tied_natural(theta[..., :4], centre), "R_D": np.exp(theta[..., 4]), "R_N": np.exp(theta[..., 5])}


def _data_constrained_starts(excess):
    halts = np.log([(3.0, 3.0), (15.0, 5.0), (60.0, 60.0)])
    tied = _tied_starts(excess)
    return np.concatenate([np.column_stack([tied, np.broadcast_to(halt, (len(tied), 2))]) for halt in halts])


def _check_repetition(columns):
    """Raises ConfigError where no run repeats data, or one has more unique tokens than tokens."""
    ratio = columns["tokens"] / columns["unique_tokens"]
    require(bool(ratio.min() > 1 - 1e-6), "unique_tokens is above tokens in some runs: it counts one epoch")
    require(bool(ratio.max() > 1.5), "no run repeats its data (tokens / unique_tokens is at most "
                                     f"{ratio.max():.3g}): fit --law chinchilla instead, or add runs of several epochs")


def _granular_terms(theta, x):
    e, g, a, b, gamma, alpha, beta = theta
    return e, g - gamma * x["granularity"] - alpha * x["params"], a - alpha * x["params"], b - beta * x["tokens"]


_granular = Sum(_granular_terms, (0, 1, 2, 3))


def _granular_natural(theta, centre):
    e, g, a, b, gamma, alpha, beta = np.moveaxis(np.asarray(theta), -1, 0)
    scale = centre[TARGET]
    return {"E": np.exp(e + scale), "A": np.exp(a + scale + alpha * centre["params"]),
            "g": np.exp(g + scale + alpha * centre["params"] + gamma * centre["granularity"]),
            "B": np.exp(b + scale + beta * centre["tokens"]), "alpha": alpha, "beta": beta, "gamma": gamma}


def _granular_starts(excess):
    grid = _chinchilla_starts(excess)[::3]
    return np.concatenate([np.column_stack([
        grid[:, 0], grid[:, 1] + np.log(share), grid[:, 1] + np.log(1 - share), grid[:, 2],
        np.full(len(grid), gamma), grid[:, 3], grid[:, 4]]) for share in (0.2, 0.6) for gamma in (0.3, 0.8)])


def _sparse_terms(theta, x):
    """1 - S, the share of parameters that a token uses, is active_params / params."""
    e, a, b, c, d, alpha, beta, lam, delta, gamma = theta
    used = x["active_params"] - x["params"]
    return e, a - alpha * x["params"], b - beta * x["tokens"], c - lam * used, d - delta * used - gamma * x["params"]


_sparse = Sum(_sparse_terms, (0, 1, 2, 3, 4))


def _sparse_natural(theta, centre):
    e, a, b, c, d, alpha, beta, lam, delta, gamma = np.moveaxis(np.asarray(theta), -1, 0)
    scale, params = centre[TARGET], centre["params"]
    used = centre["active_params"] - params
    return {"E": np.exp(e + scale), "A": np.exp(a + scale + alpha * params),
            "B": np.exp(b + scale + beta * centre["tokens"]), "c": np.exp(c + scale + lam * used),
            "d": np.exp(d + scale + delta * used + gamma * params), "alpha": alpha, "beta": beta,
            "lambda": lam, "delta": delta, "gamma": gamma}


def _check_active(columns):
    """Raises ConfigError where a token uses more parameters than there are."""
    require(bool((columns["active_params"] <= columns["params"]).all()),
            "active_params is above params in some runs: params counts all experts, active_params those a token uses")


def _sparse_starts(excess):
    grid = _chinchilla_starts(excess)[::5]
    half = grid[:, 0] + np.log(0.5)
    return np.concatenate([np.column_stack([
        half, grid[:, 1] + np.log(1 - share), grid[:, 2], half, grid[:, 1] + np.log(share), grid[:, 3], grid[:, 4],
        np.broadcast_to([lam, 0.15, 0.15], (len(grid), 3))]) for share in (0.3, 0.7) for lam in (-0.2, 0.1)])


def _best_rate(theta, x):
    c, alpha, beta = theta
    return c + alpha * x["params"] + beta * x["tokens"]


def _best_rate_natural(theta, centre):
    c, alpha, beta = np.moveaxis(np.asarray(theta), -1, 0)
    return {"c": np.exp(c + centre[TARGET] - alpha * centre["params"] - beta * centre["tokens"]), "alpha": alpha,
            "beta": beta}


def _best_batch(theta, x):
    c, beta = theta
    return c + beta * x["tokens"]


def _best_batch_natural(theta, centre):
    c, beta = np.moveaxis(np.asarray(theta), -1, 0)
    return {"c": np.exp(c + centre[TARGET] - beta * centre["tokens"]), "beta": beta}


def _sigmoid(theta, x):
    """log accuracy; `task_loss` enters as itself, over its geometric mean."""
    floor, rise, steep, middle = theta
    return jnp.logaddexp(floor, rise - jnp.logaddexp(0.0, jnp.exp(steep) * (jnp.exp(x["task_loss"]) - middle)))


def _sigmoid_natural(theta, centre):
    floor, rise, steep, middle = np.moveaxis(np.asarray(theta), -1, 0)
    mean = np.exp(centre["task_loss"])
    return {"b": np.exp(floor + centre[TARGET]), "a": np.exp(rise + centre[TARGET]), "k": np.exp(steep) / mean,
            "L_0": middle * mean}


def _sigmoid_starts(excess):
    return np.array([(np.log(floor), np.log(2 * excess), np.log(steep), middle) for floor, steep, middle in
                     itertools.product((0.2, 0.6, 0.95), (2.0, 6.0, 20.0), (0.6, 0.8, 1.0, 1.2))])


def _chained_natural(theta, centre):
    theta = np.asarray(theta)
    loss = _chinchilla_natural(theta[..., :5], {**centre, TARGET: centre["task_loss"]})
    loss.pop("a")  # the sigmoid has one too
    return {**loss, **_sigmoid_natural(theta[..., 5:], centre)}


def _power_natural(theta, centre, column):
    e, a, gamma = np.moveaxis(np.asarray(theta), -1, 0)
    scale = centre[TARGET]
    return {"E": np.exp(e + scale), "A": np.exp(a + scale + gamma * centre[column]), "gamma": gamma}


def _power_starts(excess):
    return np.array([(np.log(offset), np.log(excess - offset), gamma)
                     for offset, gamma in itertools.product((0.02, *OFFSETS), (0.02, *EXPONENTS))])


def _power_law(name, column, symbol):
    return Law(
        name, f"power law in {column} with an offset", f"L = E + A / {symbol}^gamma",
        "Henighan et al. 2020 (arXiv:2010.14701), equation 1.1", (column,), 3, ("gamma",),
        Sum(lambda theta, x: (theta[0], theta[1] - theta[2] * x[column]), (0, 1)),
        lambda theta, centre: _power_natural(theta, centre, column), _power_starts, {"E": 0, "gamma": 2},
    )


_LAWS = (
    Law("chinchilla", "Chinchilla, approach 3", "L = E + A / N^alpha + B / D^beta",
        "Hoffmann et al. 2022 (arXiv:2203.15556), equation 2", ("params", "tokens"), 5, ("alpha", "beta"),
        _chinchilla, _chinchilla_natural, _chinchilla_starts, {"E": 0, "alpha": 3, "beta": 4}),
    Law("chinchilla-tied", "Chinchilla with one exponent", "L = E + A / N^alpha + B / D^alpha",
        "Hoffmann et al. 2022 (arXiv:2203.15556), equation 2 with alpha = beta; used by Muennighoff et al. 2023 "
        "(arXiv:2305.16264)", ("params", "tokens"), 4, ("alpha",), _tied, _tied_natural, _tied_starts,
        {"E": 0, "alpha": 3}),
    Law("overtraining", "over-training", "L = E + (a M^eta + b M^-eta) C^-eta, C = 6 N D, M = D / N",
        "Gadre et al. 2024 (arXiv:2403.08540), section 3", ("params", "tokens"), 4, ("eta",), _tied,
        _overtraining_natural, _tied_starts, {}, least_squares=True),
    Law("kaplan", "Kaplan", "L = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D",
        "Kaplan et al. 2020 (arXiv:2001.08361), equation 1.5", ("params", "tokens"), 4, ("alpha_N", "alpha_D"),
        _kaplan, _kaplan_natural, _kaplan_starts, {"alpha_D": 3}),
    Law("isoflop", "isoFLOP minima (Chinchilla, approach 2)",
        "N* = N_1 (N D)^a, L* = E + A / (N D)^gamma, log L = log L* + h(C) (log N - log N*)^2",
        "Hoffmann et al. 2022 (arXiv:2203.15556), section 3.2", ("params", "tokens"), 7, ("a", "gamma"),
        isoflop.predict, isoflop.natural, _power_starts, {}, isoflop.estimate, isoflop.check,
        procedure="two stages: a parabola for each budget by least squares, then power laws through the minima"),
    Law("envelope", "envelope of training curves (Chinchilla, approach 1)",
        "N* = N_1 (N D)^a, L* = E + A / (N D)^gamma, log L = log L* + h (log N - log N*)^2",
        "Hoffmann et al. 2022 (arXiv:2203.15556), section 3.1", ("params", "tokens"), 7, ("a", "gamma"),
        isoflop.predict, isoflop.natural, _power_starts, {}, envelope.estimate, envelope.check,
        prepare=envelope.curves_at_budgets, whole_runs=True,
        procedure="two stages: the run of least loss at each budget, then power laws through them"),
    Law("data-constrained", "data-constrained (repeated tokens)",
        "L = E + A / N'^alpha + B / D'^alpha, D' = U (1 + R_D (1 - exp(-(D / U - 1) / R_D))), N' likewise with R_N",
        "Muennighoff et al. 2023 (arXiv:2305.16264)", ("params", "tokens", "unique_tokens"), 6, ("alpha",),
        _data_constrained, _data_constrained_natural, _data_constrained_starts,
        {"E": 0, "alpha": 3, "R_D": 4, "R_N": 5}, check=_check_repetition, same_unit={"unique_tokens": "tokens"},
        held={"unique_tokens": "largest"}),
    Law("moe-granularity", "mixture of experts with granularity",
        "L = E + (g / G^gamma + A) / N^alpha + B / D^beta",
        "Krajewski et al. 2024 (arXiv:2402.07871)", ("params", "tokens", "granularity"), 7, ("alpha", "beta", "gamma"),
        _granular, _granular_natural, _granular_starts, {"E": 0, "gamma": 4, "alpha": 5, "beta": 6},
        held={"granularity": "median"}),
    Law("moe-sparsity", "mixture of experts, total and active parameters",
        "L = E + A / N^alpha + B / D^beta + c / (1 - S)^lambda + d / ((1 - S)^delta N^gamma), 1 - S = N_active / N",
        "Abnar et al. 2025 (arXiv:2501.12370)", ("params", "tokens", "active_params"), 10, ("alpha", "beta"),
        _sparse, _sparse_natural, _sparse_starts, {"E": 0, "alpha": 5, "beta": 6, "lambda": 7},
        check=_check_active, held={"active_params": "share"}),
    Law("step-learning-rate", "Step Law, learning rate", "eta = c N^alpha D^beta",
        "Li et al. 2025 (arXiv:2503.04715)", ("params", "tokens"), 3, (),
        _best_rate, _best_rate_natural, lambda excess: np.zeros((1, 3)), {"alpha": 1, "beta": 2},
        target="learning_rate", lowest="loss"),
    Law("step-batch", "Step Law, batch size", "batch = c D^beta",
        "Li et al. 2025 (arXiv:2503.04715)", ("tokens",), 2, (),
        _best_batch, _best_batch_natural, lambda excess: np.zeros((1, 2)), {"beta": 1},
        target="batch_tokens", lowest="loss"),
    Law("accuracy", "accuracy from task loss", "accuracy = b + a / (1 + exp(k (L - L_0)))",
        "Bhagia et al. 2024 (arXiv:2412.04403), second step", ("task_loss",), 4, (),
        _sigmoid, _sigmoid_natural, _sigmoid_starts, {}, target="accuracy", least_squares=True),
    Law("accuracy-chained", "accuracy from parameters and tokens, by way of task loss",
        "accuracy = b + a / (1 + exp(k (L - L_0))), L = E + A / N^alpha + B / D^beta",
        "Bhagia et al. 2024 (arXiv:2412.04403), both steps", ("params", "tokens"), 9, ("alpha", "beta"),
        chained.chain(_chinchilla, _sigmoid), _chained_natural, _sigmoid_starts, {},
        chained.estimator(_chinchilla, _chinchilla_starts, _sigmoid, _sigmoid_starts), target="accuracy",
        observed=("task_loss",), procedure="two stages: Huber losses (delta 0.001) of the log task loss, then squared "
        "residuals of the accuracy given the observed task loss"),
    _power_law("compute", "flops", "C"),
    _power_law("params", "params", "N"),
    _power_law("tokens", "tokens", "D"),
)
LAWS = {law.name: law for law in _LAWS}
ALIASES = {"approach1": "envelope", "approach2": "isoflop", "approach3": "chinchilla", "gadre": "overtraining"}


def find_law(name: str, columns: Iterable[str] = ()) -> Law:
    """The law called `name`; those of mixtures are made for the shares among `columns`, the columns of the data.
    Raises ConfigError, naming the laws there are."""
    known = ALIASES.get(name, name)
    if known in mixing.FORMS:
        return _mixture_law(known, tuple(sorted(c for c in columns if c.startswith(mixing.PREFIX))))
    if known not in LAWS:
        raise ConfigError(f"--law {name!r} is not one of {', '.join([*LAWS, *mixing.FORMS, *ALIASES])}")
    return LAWS[known]


@functools.cache
def _mixture_law(name: str, shares: tuple[str, ...]) -> Law:
    require(len(shares) >= 2, f"--law {name} needs two or more columns {mixing.PREFIX}NAME, the shares of the mixture: "
                              f"name them with --columns {mixing.PREFIX}web=ITS_NAME,...")
    form = mixing.FORMS[name]
    return Law(name, form.title, form.equation, form.source, shares, form.extra + len(shares), (), form.predict(shares),
               form.natural(shares), form.starts(shares), {}, check=mixing.check(shares), shares=True)
