"""Data of every law with known parameters, on isoFLOP ladders. No pytest here: benchmarks/fit_laws.py reads it too."""

import numpy as np

from maxlm.scaling.laws import LAWS
from maxlm.scaling.runs import read_runs
from tests.scaling.ladders import ladder, write_csv


def unique_tokens(tokens):
    """Every third run sees its data once, the others 4 and 40 times."""
    return tokens / np.array([1, 4, 40])[np.arange(tokens.size) % 3]


def used(tokens):
    """The share of the parameters that a token uses."""
    return np.array([1.0, 0.5, 0.25, 0.1, 0.05])[np.arange(tokens.size) * 3 % 5]


def task_loss(params, tokens):
    return 0.4 + 40 / params**0.25 + 60 / tokens**0.25


def granularity(tokens):
    return np.array([1.0, 2, 4, 8, 16])[np.arange(tokens.size) * 3 % 5]


def data_constrained_loss(n, d, u, E, A, B, alpha, R_D, R_N):
    """Muennighoff et al. 2023, as published; U_N is where A / U_N^alpha = B / u^alpha."""
    u_n = np.minimum((A / B) ** (1 / alpha) * u, n)
    d_effective = u + u * R_D * (1 - np.exp(-(d / u - 1) / R_D))
    n_effective = u_n + u_n * R_N * (1 - np.exp(-(n / u_n - 1) / R_N))
    return E + A / n_effective**alpha + B / d_effective**alpha


SLOW = ("data-constrained", "moe-granularity", "moe-sparsity")  # laws of three inputs
CASES = {
    "chinchilla": (lambda n, d, c, E, A, B, alpha, beta: E + A / n**alpha + B / d**beta,
                   {"E": 1.7, "A": 500.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}),
    "chinchilla-tied": (lambda n, d, c, E, A, B, alpha: E + A / n**alpha + B / d**alpha,
                        {"E": 1.8, "A": 560.0, "B": 1750.0, "alpha": 0.357}),
    "overtraining": (lambda n, d, c, E, a, b, eta: E + (a * (d / n) ** eta + b * (d / n) ** -eta) * c**-eta,
                     {"E": 1.5, "a": 140.0, "b": 190.0, "eta": 0.12}),
    "kaplan": (lambda n, d, c, alpha_N, alpha_D, N_c, D_c: ((N_c / n) ** (alpha_N / alpha_D) + D_c / d) ** alpha_D,
               {"alpha_N": 0.076, "alpha_D": 0.095, "N_c": 8.8e13, "D_c": 5.4e13}),
    "data-constrained": (lambda n, d, c, **p: data_constrained_loss(n, d, unique_tokens(d), **p),
                         {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353, "R_D": 15.4, "R_N": 5.3}),
    "moe-granularity": (lambda n, d, c, E, A, g, B, alpha, beta, gamma:
                        E + (g / granularity(d) ** gamma + A) / n**alpha + B / d**beta,
                        {"E": 0.5, "A": 18.0, "g": 2.1, "B": 31.0, "alpha": 0.115, "beta": 0.147, "gamma": 0.58}),
    "moe-sparsity": (lambda n, d, flops, E, A, B, c, d_, alpha, beta, lam, delta, gamma:
                     E + A / n**alpha + B / d**beta + c / used(d)**lam + d_ / (used(d)**delta * n**gamma),
                     {"E": 0.94, "A": 16612.5, "B": 5455.7, "c": 0.46, "d_": 17.26, "alpha": 0.596, "beta": 0.395,
                      "lam": -0.167, "delta": 0.16, "gamma": 0.16}),
    "step-learning-rate": (lambda n, d, flops, c, alpha, beta: c * n**alpha * d**beta,
                           {"c": 1.79, "alpha": -0.713, "beta": 0.307}),
    "step-batch": (lambda n, d, flops, c, beta: c * d**beta, {"c": 0.58, "beta": 0.571}),
    "accuracy": (lambda n, d, c, b, a, k, L_0: b + a / (1 + np.exp(k * (task_loss(n, d) - L_0))),
                 {"b": 0.25, "a": 0.7, "k": 5.0, "L_0": 1.1}),
    "accuracy-chained": (lambda n, d, c, b, a, k, L_0, E, A, B, alpha, beta:
                         b + a / (1 + np.exp(k * (E + A / n**alpha + B / d**beta - L_0))),
                         {"b": 0.25, "a": 0.7, "k": 5.0, "L_0": 1.1, "E": 0.4, "A": 40.0, "B": 60.0, "alpha": 0.25,
                          "beta": 0.25}),
    "compute": (lambda n, d, c, E, A, gamma: E + A / c**gamma, {"E": 1.7, "A": 1600.0, "gamma": 0.16}),
    "params": (lambda n, d, c, E, A, gamma: E + A / n**gamma, {"E": 1.7, "A": 400.0, "gamma": 0.34}),
    "tokens": (lambda n, d, c, E, A, gamma: E + A / d**gamma, {"E": 1.7, "A": 410.0, "gamma": 0.28}),
}


def runs_of(name, path):
    """The runs of a law without noise, read from a file written to `path`, and its parameters."""
    params, tokens = ladder(*(9, 9) if name in SLOW else ())
    columns, truth = columns_of(name, params, tokens)
    write_csv(path, **{column: values.tolist() for column, values in columns.items()})
    return read_runs(path, LAWS[name].needed), truth


def columns_of(name, params, tokens):
    make, truth = CASES[name]
    flops = 6 * params * tokens * np.where(name == "compute", np.geomspace(1, 1.01, params.size), 1)
    made = {"loss": np.ones(params.size), LAWS[name].target: make(params, tokens, flops, **truth)}
    columns = {"params": params, "tokens": tokens, "flops": flops, "unique_tokens": unique_tokens(tokens),
               "granularity": granularity(tokens), "task_loss": task_loss(params, tokens),
               "active_params": params * used(tokens), **made}
    return columns, truth
